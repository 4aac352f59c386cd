"""The help texts of the command line. Imports no torch."""

EXIT_CODES = (
    "Exit codes: 0 done; 1 a claim of the file failed (verify); 2 bad input, with one line that says what; "
    "3 the model, or the hub, is not available here; 4 no small circuit is faithful (run); "
    "70 an unexpected error (see --traceback)."
)
HELP = f"""Find the circuit of a task in a transformer, write it to a file, and check the file again.

A first session; nothing of it needs a network:

\b
  discover-circuit list                               tasks, methods, models, stored circuits
  discover-circuit run ioi --effort quick             find a circuit of the bundled model; files in out/
  discover-circuit show ioi-bundled-eap-ig            heads and edges of a stored circuit, or of a file
  discover-circuit verify ioi-bundled-eap-ig          run it again: does every claim hold?
  discover-circuit view ioi-bundled-eap-ig            its page in the browser
  discover-circuit eval ioi-bundled-eap-ig --task ioi_distractor

Every command has --help with examples. --install-completion makes the shell complete names.

{EXIT_CODES}
"""
RUN_HELP = f"""Discover the circuit of a task, evaluate it on held-out pairs, write its file and a report page.

TASK is a task of the package (see `discover-circuit list`), your own task file (.yaml), or a file of pairs (.jsonl or
.csv with the columns clean, corrupt, right, wrong as texts or token ids).

First the model must do the task (--anyway goes on without). Without --edges and --threshold the circuit is the
smallest whose faithfulness lies in [0.92, 1.1] with its whole interval on the validation pairs; methods cd, acdc,
path-patching and learned masks choose their own. How stable it is when the train pairs are drawn again is measured and
printed. A run that was killed resumes when the same command is given again. NAME.run.yaml, beside the circuit file,
repeats the run (--config). Files that another command has written are not replaced without --force.

\b
  discover-circuit run ioi
  discover-circuit run ioi --effort quick
  discover-circuit run ioi --dry-run
  discover-circuit run ioi --edges 60 --method eap --out out/small
  discover-circuit run ioi --level node --positions IO,S1,S2,end --nodes 40
  discover-circuit run greater_than --model gpt2 --device cuda
  discover-circuit run my_pairs.jsonl --model ./my_model --metric prob_diff
  discover-circuit run --config out/ioi-bundled-mattr.run.yaml --seed 1 --out out/seed1

{EXIT_CODES}
"""
MERGE_HELP = f"""Finish a run whose edges were scored in shards, each by `run ... --shard I/N` on any machine.

The tables of scores are added in the order of the examples, in float64, so the circuit is the one that a single run
finds. The shards say which run it is; the model and the pairs must be the same here. docs: "Run on a cluster".

\b
  discover-circuit run ioi --method eap-ig --shard 1/2
  discover-circuit run ioi --method eap-ig --shard 2/2
  discover-circuit merge out/ioi-bundled-eap-ig.*-of-2.shard

{EXIT_CODES}
"""
EVAL_HELP = f"""Evaluate a circuit file on held-out pairs of its own task, or of another one: does it transfer?

\b
  discover-circuit eval out/ioi-bundled-eap-ig.circuit.json
  discover-circuit eval ioi-bundled-eap-ig --task ioi_distractor
  discover-circuit eval ioi-bundled-eap-ig --tests

{EXIT_CODES}
"""
GRAPH_HELP = f"""The attribution graph of one prompt: what tokens, features of transcoders, errors and constants add to
the model's next token, directly and through each other. It is checked against the model, pruned, and written as
Neuronpedia's JSON; with --page also as a page for the browser.

The graphs of several prompts (on the command line, of a file, or of a task) are aggregated: mean influence and edges,
and in which share of the prompts each is. --dry-run says what it will take.

\b
  discover-circuit graph "When Mary and John went to the store, John gave a drink to"
  discover-circuit graph "PROMPT" --model ./my_model --transcoders ./my_transcoders --target " Mary"
  discover-circuit graph "PROMPT" --held nothing --page graph.html
  discover-circuit graph --task ioi --examples 16 --held nothing --page ioi.html
  discover-circuit graph "PROMPT" "ANOTHER" --aggregate kept

{EXIT_CODES}
"""
EXPORT_HELP = f"""Write a circuit file in another tool's format, and say what that format cannot hold.

\b
  discover-circuit export ioi-bundled-eap-ig --format dot --out ioi.dot
  discover-circuit export FILE --format latex

{EXIT_CODES}
"""
IMPORT_HELP = f"""Make a circuit file from another tool's file: its edges, on the graph of a model.

Scores are left out, because these files do not state their sign; from Python they can be read if you state it.

\b
  discover-circuit import graph.json --format eap-ig-json --model gpt2 --out mine.circuit.json

{EXIT_CODES}
"""
VIEW_HELP = f"""Write the page of a circuit file and open it: its graph, sizes, patterns and tokens.

FILE is a .circuit.json, or the name of a stored circuit (see `discover-circuit list`). The page is one file that needs
no network. Attention patterns need the model; where it is not available they are left out, and the page says so.

\b
  discover-circuit view out/ioi-bundled-eap-ig.circuit.json
  discover-circuit view ioi-wang2022-heads --out ioi.html --no-open

{EXIT_CODES}
"""
VERIFY_HELP = f"""Check a circuit file: every hash, the model, the pairs, and the evaluation run again.

FILE is a .circuit.json, or the name of a stored circuit (see `discover-circuit list`). Three lists say what was
recomputed, what is only protected by a hash, and what is free text. Warnings say what could mislead even if every claim
holds: parts that were left out, few examples, names that do not mean what they say.

\b
  discover-circuit verify out/ioi-bundled-eap-ig.circuit.json
  discover-circuit verify ioi-bundled-eap-ig --rescore --strict

{EXIT_CODES}
"""
DIRECT_HELP = f"""Find the direction from the corrupt to the clean prompts of a task, test it, and write its file.

It is fitted on train pairs at every site, the site is chosen on validation pairs, and the numbers are of held-out
pairs: accuracy beside the controls (shuffled labels, control task, embeddings), and what adding it to the corrupt
prompts changes, beside random directions. `show` and `verify` take the file, too.

\b
  discover-circuit direct subject_verb_agreement
  discover-circuit direct ioi --method logistic --site resid_pre --layers 1,2,3 --position S2
  discover-circuit direct ioi --method lda --set shrinkage=0.1

{EXIT_CODES}
"""
COMPARE_COLUMNS = (
    "CPR: mean faithfulness over the share of edges, the largest scores by value first; above 1 is overshoot",
    "CMD: mean distance of faithfulness from 1, the largest scores by magnitude first; 0 is best",
    "@80%, @90%: the smallest of these sizes with that faithfulness",
    "log: mean faithfulness, at most 1, over the logarithm of the share: how good small circuits are",
    "fwd, bwd: forward and backward passes per example; s: seconds of scoring",
)
"""What the columns of `compare` are."""
COMPARE_HELP = f"""Compare methods on one task: faithfulness of their circuits at ten sizes, areas, overlap, cost.

Sizes and areas (CPR, CMD) are those of MIB. All methods score the same train pairs
and are evaluated on the same held-out pairs.

\b
  discover-circuit compare ioi
  discover-circuit compare ioi --methods eap,eap-ig,acdc,cd --out out/compare
  discover-circuit compare ioi --methods acdc,edge-pruning --set acdc.tau=0.05

{EXIT_CODES}
"""
DIFF_HELP = """Compare two circuit files: edges, nodes, roles, scores, and how they were made. No model runs.

A and B are circuit files, or names of stored circuits. Read the notes that come first: they say what cannot be
compared. --out draws both circuits over each other.

\b
  discover-circuit diff ioi-bundled-eap-ig ioi-bundled-cd-edges
  discover-circuit diff old.circuit.json new.circuit.json --out difference.html

Exit codes, as those of diff: 0 the same nodes and edges (whatever else differs); 1 they differ; 2 bad input.
"""
CITE_HELP = f"""Print BibTeX: for the paper (of a published circuit), for the file with its hash, and for the software.

Author, year and address are what the file states, or what you say.

\b
  discover-circuit cite ioi-bundled-mattr
  discover-circuit cite FILE --author "Ada Lovelace and Alan Turing" --year 2026 --url https://example.org/FILE

{EXIT_CODES}
"""
VALIDATE_HELP = f"""Check form and hashes of a circuit file; no model is needed.

For a folder: whether MIB's circuit track would accept it as a submission; every problem is listed.

{EXIT_CODES}
"""
PUSH_HELP = f"""Upload a circuit file, with its file of scores, to a repository of the Hugging Face hub, as one commit.

The file is checked first. REPO is org/name, or datasets/org/name; it must exist. Your identity is taken from HF_TOKEN
or `hf auth login`, the address of the hub from HF_ENDPOINT.

\b
  discover-circuit push out/ioi-gpt2-eap-ig.circuit.json me/circuits

{EXIT_CODES}
"""
PULL_HELP = f"""Download a circuit file, with its file of scores, from the Hugging Face hub; check it, then keep it.

Give the --revision: only a commit (40 hex digits) is reproducible; for a branch or tag its commit is printed. PATH may
be left out if the repository has one circuit file only.

\b
  discover-circuit pull me/circuits/ioi-gpt2-eap-ig.circuit.json --revision COMMIT

{EXIT_CODES}
"""
