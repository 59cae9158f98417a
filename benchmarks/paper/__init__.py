""" Where the distance between the paper's AiT and its ViT comes from: their two bodies, with and without workspaces.

    python -m benchmarks.paper --data-dir CIFAR10 --output output/paper --body ait vit --mlp plain published --seed 0 1

Trains every pair of a body and an MLP with every seed, one after the other, as the published code trains: AdamW, a
cosine that moves once an epoch, crop and flip, the data on the device. Runs that are finished are kept. `--report`
gathers what is there into tables and a figure.
"""
