""" What one rank does: run all scenarios and save their results. """
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import global_batch, one_memory

if __name__ == '__main__':
    dist.init_process_group('gloo', timeout=timedelta(seconds=30))
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    results = {}
    for topic, scenarios in {'one_memory': one_memory.SCENARIOS, 'global_batch': global_batch.SCENARIOS}.items():
        for name, scenario in scenarios.items():
            print(f'rank {rank}: {topic}, {name}', flush=True)
            results[topic, name] = scenario(rank, num_ranks)
    torch.save(results, Path(sys.argv[1]) / f'{rank}.pt')
    dist.destroy_process_group()
