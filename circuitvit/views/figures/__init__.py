"""How views look. The only part of the library that needs matplotlib (`pip install circuitvit[plots]`).

Figures never touch pyplot: none is shown or kept open behind the caller's back, and no setting of matplotlib
is changed outside the `with` of one drawing.
"""
