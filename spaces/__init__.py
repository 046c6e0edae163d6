"""What may be changed in a model, and the changed model.

Only the search space itself is imported here: it needs numpy, everything else in this package needs torch.
"""

from .space import Candidate, Choice, Kind, Option, SearchSpace

__all__ = ["Candidate", "Choice", "Kind", "Option", "SearchSpace"]
