"""Search spaces: small files of data, one a space.

A space is a module with `SPACE`, a dictionary from configuration field (`section.field`) to an
Optuna distribution, and `FIRST`, points that are tried before anything is sampled. A point may
leave fields out; those are sampled. What a field may be is said by the configuration, and a space
is checked against it before anything starts.
"""
