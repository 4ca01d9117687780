"""Studies: each one YAML of settings and one short script; a table, a figure and a paragraph."""
