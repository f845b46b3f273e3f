from .merge import dense_equivalent as dense_equivalent
from .merge import merge_experts as merge_experts
from .prune import prune_experts as prune_experts
from .quantise import grouped as grouped
from .quantise import quantise_directory as quantise_directory
from .reduce import reduce_directory as reduce_directory
from .upcycle import upcycle_directory as upcycle_directory
from .upcycle import upcycle_model as upcycle_model
