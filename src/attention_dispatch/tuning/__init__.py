"""Choose backends by measurement: run the candidates on real calls, keep the result on disk, read it back.

``environment`` what a measurement holds for; ``store`` the file; ``measure`` interleaved timing; ``exactness`` errors
against float64 on sampled rows; ``candidates`` what is worth measuring; ``session`` the ``with tuning():`` scope;
``health`` checks of each backend in a child process; ``shapes`` the attention calls of real models.
"""
