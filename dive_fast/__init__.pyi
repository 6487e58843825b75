from dive_fast.api import Config as Config
from dive_fast.api import compare as compare
from dive_fast.api import evaluate as evaluate
from dive_fast.api import load as load
from dive_fast.api import train as train
from dive_fast.kernels import contrastive_loss as contrastive_loss
from dive_fast.kernels import difference_loss as difference_loss
from dive_fast.kernels import distillation_loss as distillation_loss
from dive_fast.kernels import dive_loss as dive_loss

__version__: str
