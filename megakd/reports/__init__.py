"""What a run says of itself: its plan before, report.json, table, page and card after."""
