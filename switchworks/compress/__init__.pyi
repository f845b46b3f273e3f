from .directories import grouped as grouped
from .directories import quantise_directory as quantise_directory
from .directories import reduce_directory as reduce_directory
from .fewer import dense_equivalent as dense_equivalent
from .fewer import reduce_experts as reduce_experts
from .fewer import route_batch as route_batch
from .upcycle import upcycle_directory as upcycle_directory
from .upcycle import upcycle_model as upcycle_model
