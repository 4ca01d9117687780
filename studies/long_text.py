"""Do thoughts pay on long sequences, which a decoder sees sixteen tokens at a time?

What z tells of a text it tells once and at the same KL, however long the text: at the same window a
long sequence has more to gain from it. Cells, figure and paragraph are those of `studies.text`.
"""

from studies.text import cell, figure, paragraph

__all__ = ["cell", "figure", "paragraph"]
