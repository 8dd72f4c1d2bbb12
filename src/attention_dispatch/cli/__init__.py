"""The command ``attention-dispatch``: list, explain, doctor, tune and bench."""
