"""Reports of a run: report.json, report.html, the result table and the model card."""
