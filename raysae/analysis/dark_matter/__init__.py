"""The dark matter of SAEs (Engels, Riggs and Tegmark, arXiv 2410.14670): an experiment per file."""
