""" What one rank does: run all scenarios and save their results. """
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import global_batch, one_memory


def run(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # a collective that not all ranks reach gives up
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=num_ranks,
        timeout=timedelta(seconds=60))
    results = {}
    for topic, scenarios in {'one_memory': one_memory.SCENARIOS, 'global_batch': global_batch.SCENARIOS}.items():
        for name, scenario in scenarios.items():
            print(f'rank {rank}: {topic}, {name}', flush=True)
            results[topic, name] = scenario(rank, num_ranks)
    torch.save(results, folder / f'{rank}.pt')
    dist.destroy_process_group()
