"""The fault drill: commands are disturbed in every way we know, taken up again, and must give the undisturbed result.

``python -m tests.faults`` runs the long form and prints the table of ``docs/faults.md``.
"""
