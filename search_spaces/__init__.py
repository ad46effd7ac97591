"""Search spaces: small files of data, one a space.

A space is a module with `SPACE`, a dictionary from configuration field (`section.field`) to an
Optuna distribution, in the order of sampling; `FIRST`, points that are tried before anything is
sampled; and, where some knobs go with values of others only, `CONDITIONS`, a dictionary from knob
to a pair of an earlier knob and the values it must have. A point may leave fields out; those are
sampled. What a field may be is said by the configuration, and a space is checked against it before
anything starts.
"""
