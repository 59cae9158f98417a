""" Train registered models on one data set with equal budgets, and compare them.

    python -m benchmarks.compare examples/compare_cifar10.yaml --data-dir CIFAR10 --output output/compare_cifar10

A recipe (see recipe.py) names the data set, the budget and the runs, each a registered model with its arguments. Every
run trains for the same steps on the same batches with the same augmentation, once per seed. Finished runs are kept, and
an interrupted one resumes from its last checkpoint. When all are done, the command writes `results.json`, `table.md`
and `learning_curves.svg`.
"""
