"""Results: records of any run read as tables, their statistics, files to export, and pictures."""
