"""Discovery: scores for every edge, and the selection of a circuit. Importing this registers the methods."""

from mechinterp.discovery import eap as eap
from mechinterp.discovery import exact as exact
