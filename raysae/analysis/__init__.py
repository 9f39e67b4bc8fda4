"""Takes SAEs apart: the analyses of a study, their figures, their claims and their reports."""
