"""What the command line says about itself beyond its options: for --help, the manual page and docs/cli.md.

Every example is one that the parser takes (a test holds it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import fill
from typing import Final

_AWAY = "the agent cannot be asked, or does not know the pod"
_NOT_BEGUN = "it could not begin"
WIDTH: Final = 90  # columns of running text


@dataclass(frozen=True, slots=True)
class Page:
    """`examples`: command line without "sluice" -> what it is for. `codes`: exit code -> what it means."""

    about: str
    examples: Mapping[str, str] = field(default_factory=dict)
    codes: Mapping[int, str] = field(default_factory=dict)

    @property
    def paragraphs(self) -> tuple[str, ...]:
        return tuple(self.about.split("\n\n"))

    @property
    def description(self) -> str:
        """Above the options."""
        return "\n\n".join(fill(one, WIDTH) for one in self.paragraphs)

    @property
    def epilog(self) -> str:
        """Below the options."""
        text = []
        if self.examples:
            width = max(map(len, self.examples))
            text.append("\n".join(["examples:", *(f"  sluice {a:<{width}}  {b}" for a, b in self.examples.items())]))
        if self.codes:
            text.append("\n".join(["exit codes:", *(f"  {code:<4}{words}" for code, words in self.codes.items())]))
        return "\n\n".join(text)


EXIT_CODES: Final[Mapping[int, str]] = {
    0: "fine",
    1: "something is wrong with what was looked at: drift, or a check that failed",
    2: "the command could not do its work; one line on standard error says why and what to do",
    130: "ended by Ctrl-C",
}
ENVIRONMENT: Final[Mapping[str, str]] = {
    "SLUICE_RUN_DIR": "the agent's directory, as --run-dir",
    "SLUICE_BPF_DIR": "what backend ebpf keeps in the kernel, as --bpf-dir",
    "SLUICE_CONFIG": "file of settings, as --config",
    "SLUICE_<SETTING>": "any setting, as in SLUICE_BACKEND=ebpf; a flag wins over it, and it wins over the file",
}
FILES: Final[Mapping[str, str]] = {
    "/run/sluice/agent.sock": "where commands ask the agent; root's alone",
    "/run/sluice/cni.sock": "where the CNI plugin asks it",
    "/run/sluice/pods, netns, exempt": "what a new agent must know of pods, and the plugin without one",
    "/sys/fs/bpf/sluice": "what backend ebpf and the account keep in the kernel",
    "/var/run/ztunnel/ztunnel.sock": "where ztunnel connects",
}
TOP: Final = "\n\n".join(
    "\n".join([f"{title}:", *(f"  {key!s:<{width}}  {words}" for key, words in rows.items())])
    for title, width, rows in (("Exit codes", 4, EXIT_CODES), ("Environment", 16, ENVIRONMENT), ("Files", 31, FILES))
)

PAGES: Final[Mapping[str, Page]] = {
    "status": Page(
        "The agent of this node: its version, backend and why that one, what became of connections, ztunnels, pods.",
        {"status": "as a list", "status -o json": "for programs"},
        {0: "the agent answered, ready or not", 2: "it cannot be asked"},
    ),
    "pods": Page(
        "The pods of this node, whether each is captured, and why or why not.\n\n"
        "States: enabled (its rules are verified, and ztunnel listens in it), pending (its rules hold, but ztunnel "
        "does not listen in it: its connections are refused), excluded, failed (see REASON), waiting (the agent has "
        "not examined it yet, or it runs and gets its rules once ztunnel listens in it, after 30 s at the latest).",
        {"pods": "all of this node", "pods -n shop": "of one namespace", "pods -o json": "for programs"},
        {0: "the agent answered", 2: "it cannot be asked"},
    ),
    "explain": Page(
        "Why a pod is captured or not, and whether that holds. The first three lines say it and what to do; then come "
        "every label, annotation and setting that was asked, with an arrow at the one that decided; each option with "
        "where it comes from; wanted against actual for every layer, ztunnel, its listeners, the node's probes; what "
        "became of the last connections; the last repairs, and who made them necessary.",
        {
            "explain shop/web": "by namespace and name",
            "explain web": "by its name, when it is alone on this node",
            "explain -n shop web": "as kubectl has it",
            "explain shop/web -o json": "for programs",
        },
        {0: "the pod is known here, captured or not", 2: _AWAY},
    ),
    "connections": Page(
        "Connections of pods: those that live, the last that ended, and with --follow each that ends from now on.\n\n"
        "Fates: captured (through ztunnel), exempt (rightly not; the reason is in brackets), leaked (should have been "
        "captured and was not), undecided (failed before that was known).",
        {
            "connections": "all pods: the last 20 that ended, and the live ones",
            "connections shop/web": "of one pod",
            "connections --fate leaked -n 100": "what went around ztunnel",
            "connections --follow -o json": "a line of JSON each, until Ctrl-C",
        },
        {0: "the agent answered", 2: _AWAY + ", or went away while --follow ran", 130: "--follow was ended by Ctrl-C"},
    ),
    "verify": Page(
        "Compares what should hold with what the kernel holds, pod by pod. With --all the node's own parts too. "
        "Made for pipelines: after an upgrade of the CNI, the kernel or Sluice, run it and look at the exit code.",
        {
            "verify --all": "everything on this node",
            "verify shop/web": "one pod",
            "verify shop/web --repair": "put right what differs, then compare again",
            "verify --all -o json": "for programs: differences and the scripts that would repair them",
        },
        {0: "all is as it should be", 1: "something differs", 2: "something could not be looked at; or " + _AWAY},
    ),
    "diff": Page(
        "What a repair would change in a pod, as the mechanism's own script. Changes nothing.",
        {"diff shop/web": "nothing is printed when all is right", "diff shop/web -o json": "for programs"},
        {0: "nothing differs", 1: "something does", 2: "it could not be looked at; or " + _AWAY},
    ),
    "doctor": Page(
        "Looks at this node for what is known to break capture, and says what is wrong, why, and what to type. Changes "
        "nothing. Without an agent it says what can be seen without one. Run it as root, in the node's PID namespace.",
        {
            "doctor": "all checks",
            "doctor --list": "what there is to check, and what each looks at",
            "doctor -o json": "for programs",
        },
        {0: "nothing is wrong; there may be warnings", 1: "something is wrong", 2: "it could not look"},
    ),
    "report": Page(
        "Writes what somebody needs who is to help into one file: what the other commands show, rules, logs and "
        "settings, with secrets taken out. Its MANIFEST lists what is in it; read it before you send it.",
        {
            "report": "of this node, into the current directory",
            "report --pod shop/web": "of its pods this one alone",
            "report --addresses hashed": "with each address replaced by the same word everywhere",
        },
        {0: "it is written; what could not be taken is told", 2: "it could not be written"},
    ),
    "preflight": Page(
        "What this node's kernel can do for each backend, tried out in a network namespace that goes away, and which "
        "backend an agent would choose. Needs no agent, changes nothing.",
        {"preflight": "what an agent would choose", "preflight --backend ebpf": "whether that one could be used"},
        {0: "a backend can be used", 1: "something that is needed is missing; what to do is told", 2: _NOT_BEGUN},
    ),
    "rules": Page("The rules themselves, without an agent and without touching anything."),
    "rules render": Page(
        "Prints the rules of a variant as the backend's own script.",
        {
            "rules render --backend nftables": "of a pod with everything as usual",
            "rules render --backend iptables --no-ipv6": "of a pod without IPv6",
            "rules render --backend nftables --dns-to 10.96.0.10": "with DNS captured towards this resolver alone",
        },
        {0: "printed", 2: "there is no such variant"},
    ),
    "install": Page(
        "Puts the CNI plugin and its configuration in place once, as an agent keeps doing. Needs no agent.",
        {"install": "put them in place", "install --check": "change nothing, only tell"},
        {0: "all is in place", 1: "it is not", 2: "it could not be done"},
    ),
    "uninstall": Page(
        "Takes the CNI plugin and its configuration out of this node; new pods start as if Sluice had never been here. "
        "The rules in pods are `sluice uncapture`'s. The agent must not run, or it would put everything back.",
        {"uninstall --dry-run": "only show what would be done", "uninstall": "do it"},
        {0: "nothing names the plugin any more", 1: "something could not be done", 2: _NOT_BEGUN},
    ),
    "uncapture": Page(
        "Takes all rules of this program out of this node, pod by pod. Needs no agent, no API server and no state: "
        "what is found in the namespaces counts. The agent must not run, or it would put everything back.",
        {
            "uncapture --all --dry-run": "only show what would be removed; an agent may run",
            "uncapture --all": "remove it",
            "uncapture --all --annotations --config /etc/sluice/sluice.yaml": "in a cluster: the pods' annotation, too",
            "uncapture --all --netns /run/netns/web-0": "in this namespace, and nothing else of the node",
        },
        {0: "nothing of ours is left", 1: "something is", 2: _NOT_BEGUN},
    ),
    "handback": Page(
        "Leaves captured pods captured, but as istio-cni would have programmed them, and forgets them.",
        {"handback --all --dry-run": "only show what would be changed", "handback --all": "do it"},
        {0: "all are handed back", 1: "some are not", 2: _NOT_BEGUN},
    ),
    "migrate": Page(
        "From istio-cni to Sluice on this node, and back, without a pod that starts uncaptured in between. What was "
        "interrupted goes on when the command is run again.",
        {
            "migrate --check": "only look: what is in the way, what will differ",
            "migrate --check --values values.yaml": "with istio-cni's own settings",
            "migrate --take-over": "our entry in front, then istio-cni's out of the way",
            "migrate --back --dry-run": "the steps back",
        },
        {0: "it can be done, or is done", 1: "something is in the way or left to do; what is told", 2: _NOT_BEGUN},
    ),
    "agent": Page(
        "Runs the node agent: takes pods from the CNI plugin, from Kubernetes and from the static file, programs their "
        "namespaces, hands them to ztunnel and keeps them right. SIGTERM and SIGINT end it and leave every "
        "rule in place. Settings are read once, at its start.",
        {
            "agent --config /etc/sluice/sluice.yaml": "settings from a file",
            "agent --backend nftables --log-level debug": "settings as flags, which win over file and environment",
        },
        {0: "it was told to end", 1: "a defect ended it: see its log", 2: "it cannot run like this"},
    ),
    "ztunnel": Page(
        "Runs the embedded layer 4 proxy until it is told to end. It stands in for ztunnel where there is no istiod: "
        "it relays, and counts, but does not encrypt.",
        {"ztunnel --records -": "with a line of JSON per connection on standard output"},
        {0: "it was told to end", 2: "it cannot run like this"},
    ),
    "lab": Page(
        "Nodes and pods in network namespaces of this machine, to try things on. Nothing outside them is touched."
    ),
    "lab demo": Page(
        "The main job with real traffic, shown and proven. Leaves nothing behind.",
        {"lab demo": "with nftables", "lab demo --backend ebpf": "with eBPF"},
        {0: "every claim held", 1: "one did not", 2: "the lab could not be built"},
    ),
    "lab up": Page(
        "Builds the lab and leaves it running.",
        {"lab up": "two nodes, pods, agents, ztunnels", "lab up --without-sluice": "plain pods, for comparison"},
        {0: "it runs", 2: "it could not be built"},
    ),
    "lab down": Page("Removes the lab, also one that is half built.", {"lab down": "all of it"}, {0: "it is gone"}),
    "lab exec": Page(
        "Runs a command in a pod of the lab.",
        {"lab exec shop/client -- ip address": "what it sees of its network"},
        {0: "whatever the command ends with", 2: "there is no such pod, or no command"},
    ),
    "lab pods": Page("The pods of the lab and their addresses.", {"lab pods": ""}, {0: "listed", 2: "no lab is up"}),
    "help": Page(
        "The help of a command, as --help after it. Without one, that of the program.",
        {"help explain": "as sluice explain --help", "help lab up": "of a command in a group"},
        {0: "printed", 2: "there is no such command"},
    ),
    "version": Page("The version of this program. That of the agent that runs is in `sluice status`.",
                    {"version": "", "version -o json": "for programs"}, {0: "printed"}),
    "completion": Page(
        "Prints what makes a shell complete commands, options, their values and POD, the last by asking the agent. "
        "`pods` prints the names that POD may be, for those scripts; nothing when no agent answers within a second.",
        {
            "completion bash >/etc/bash_completion.d/sluice": "bash, for all users",
            "completion zsh >/usr/local/share/zsh/site-functions/_sluice": "zsh",
            "completion fish >/etc/fish/completions/sluice.fish": "fish",
        },
        {0: "printed"},
    ),
}  # fmt: skip
