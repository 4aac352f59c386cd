"""Discovery: scores for every edge, and the selection of a circuit. Importing this registers the methods."""

from mechinterp.discovery import acdc as acdc
from mechinterp.discovery import baselines as baselines
from mechinterp.discovery import cd as cd
from mechinterp.discovery import cd_edges as cd_edges
from mechinterp.discovery import eap as eap
from mechinterp.discovery import exact as exact
from mechinterp.discovery import information_flow as information_flow
from mechinterp.discovery import mask_learning as mask_learning
from mechinterp.discovery import path_search as path_search
