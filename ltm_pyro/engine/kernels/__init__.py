"""Ways of computing that buy a tenth of a step or of a token; see the README one folder up."""
