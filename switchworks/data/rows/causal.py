"""The causal objective: a row is text to be continued, token by token. Pure numpy.

The tokens of a window are the targets; there are no inputs. EOS follows every document that ends
inside the window; each EOS pushes one token out at the window's end, so that rows stay full.
Nothing is random.

    window   it was so . | Once upon a
    targets  it was so . EOS Once upon
    segments  1   1  1 1   1    2    2

Letters: N tokens of a window.
"""

import numpy as np
from jaxtyping import Int


def causal_row(
    tokens: Int[np.ndarray, " N"], starts: Int[np.ndarray, " documents"], eos_id: int
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """(targets, segments), int64, of a window in which documents start at the offsets `starts`.

    Segments count the documents from 1; a document's EOS belongs to it. The last document of a
    window has an EOS only if its end is inside, so EOS always means that a document ended.
    """
    targets = np.insert(tokens.astype(np.int64), starts, eos_id)[: len(tokens)]
    ends = starts + np.arange(len(starts))  # positions of the EOS in `targets`
    return targets, np.searchsorted(ends, np.arange(len(tokens))) + 1
