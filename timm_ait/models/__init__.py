from .ait_vit import *
from .associative_transformer import *
from .centroid_transformer import *
from .coordination import *
from .from_timm import *
from .perceiver import *
from .set_transformer import *
