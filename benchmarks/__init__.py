""" What measures, run from the checkout: python -m benchmarks.compare, benchmarks.results, … """
