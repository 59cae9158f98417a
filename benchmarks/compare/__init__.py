""" Train registered models on one data set with equal budgets, and compare them.

    python -m benchmarks.compare examples/compare_cifar10.yaml --data-dir CIFAR10 --output output/compare_cifar10

A recipe (recipe.py tells its keys) names the data set, the budget and the runs, each a model of timm's registry with
its arguments. Every run is trained for the same steps on the same batches with the same augmentation, once per seed.
Finished runs are kept, an interrupted one goes on from its last checkpoint; when all are there, the command writes
`results.json`, `table.md` and figures.
"""
