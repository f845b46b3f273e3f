from .experts import PagedExperts as PagedExperts
from .load import ExpertCache as ExpertCache
from .load import expert_cache as expert_cache
from .load import load_paged as load_paged
from .stacks import Traffic as Traffic
