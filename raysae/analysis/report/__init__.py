"""An HTML page and claims as machinery, which know no paper."""
