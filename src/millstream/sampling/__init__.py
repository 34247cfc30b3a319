"""Which sample a training run takes next, as arithmetic on one number: no files, no torch, no random state.

`g` numbers the samples of a whole training run from 0, over all epochs and all ranks. An order says which sample that
is, `share` which of them a rank takes. Nothing here has to be saved but g.
"""
