from .app import create_app as create_app
from .config import ServeConfig as ServeConfig
from .run import serve as serve
