"""Train, use and understand sparse mixture-of-experts transformers.

`__init__.pyi` lists the whole public interface; docs/tour.md says how to read the rest. Names are
imported when they are first used, so that `switchworks --help` need not wait for torch. Every
package below has such a face: what it lists may be used from outside, the rest may not.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
