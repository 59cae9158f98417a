#!/usr/bin/env bash
# Runs for a GPU, one after another: what the layer and the models cost, the weights for CIFAR-10 and pets, and the
# four models of docs/paper.md at the paper's setting, but in bfloat16.
#
#   examples/on_device/all.sh CIFAR10 PETS OUTPUT [workspace.py's further arguments]
#
# Run from the top of the checkout. Finished runs are kept; the same command starts unfinished ones again from their
# beginning.
set -euo pipefail
cifar10=$1 pets=$2 output=$3
shift 3
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" TORCHINDUCTOR_CACHE_DIR="$output/inductor"
mkdir -p "$output/logs"
exec 9> "$output/lock"  # held by whatever this starts, until it ends
flock -n 9 || { echo "another run writes to $output" >&2; exit 1; }
trap 'trap - INT TERM; kill 0' INT TERM

# Start a run of train_on_device.py in the background. It compiles while another one trains, then waits for its turn.
train() {
    local name=$1 data=$2
    shift 2
    [ -f "$output/$name/done" ] && return
    rm -rf "${output:?}/$name"
    (
        python examples/on_device/train_on_device.py --data-dir "$data" --output "$output/$name" \
            --cache "$output/cache" --lock "$output/turn" "$@"
        touch "$output/$name/done"
    ) > "$output/logs/$name.txt" 2>&1 &
    # the next one starts to compile, and to wait, when this one is next in turn or is over
    while kill -0 $! 2> /dev/null && ! grep -qs ready "$output/$name/log.jsonl"; do sleep 1; done
}

if [ ! -f "$output/workspace_done" ]; then
    python benchmarks/workspace.py --device cuda --dtype bfloat16 float32 --part layer models --tokens 8192 32768 \
        --batch-sizes 128 512 --compile --rounds 7 --round-seconds 0.03 "$@" | tee "$output/logs/workspace.txt"
    touch "$output/workspace_done"
fi

configs=examples/on_device
teacher="$output/cifar10_teacher/model.safetensors"
train cifar10_teacher "$cifar10" --config $configs/cifar10_teacher.yaml
train ait_small_cifar10 "$cifar10" --config $configs/ait_small_cifar10.yaml --kd-model-file "$teacher"
train pets "$pets" --config $configs/ait_vit_small_pets.yaml
# AiT-Medium starts from the small one, which must be finished before it takes its turn
while [ ! -f "$output/ait_small_cifar10/done" ] && [ -n "$(jobs -r)" ]; do sleep 1; done
train ait_medium_cifar10 "$cifar10" --config $configs/ait_medium_cifar10.yaml --kd-model-file "$teacher" \
    --init "$output/ait_small_cifar10/model.safetensors"
wait

for name in cifar10_teacher ait_small_cifar10 pets ait_medium_cifar10; do
    [ -f "$output/$name/done" ] || { echo "$name has failed, see $output/logs/$name.txt" >&2; failed=1; }
done

python -m benchmarks.compare examples/compare_bodies.yaml --data-dir "$cifar10" --output "$output/compare_bodies_full" \
    --runs 'published AiT' 'published ViT' 'AiT body, plain' 'AiT body, plain + LayerNorm' \
    --model-kwargs '{dim: 768}' --steps 9700 --batch-size 512 --lr 1e-4 --warmup-steps 485 --eval-every 485 \
    --seeds 0 --amp-dtype bfloat16 --device cuda --compile | tee "$output/logs/compare_bodies_full.txt"
exit "${failed:-0}"
