from .associative_transformer import *
