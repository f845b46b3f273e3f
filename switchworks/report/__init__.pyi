from .compression import write_compression as write_compression
from .languages import write_languages as write_languages
from .page import write_report as write_report
from .routing import page_folder as page_folder
from .routing import write_routing_report as write_routing_report
from .runs import Run as Run
from .runs import read_run as read_run
from .runs import when_reached as when_reached
