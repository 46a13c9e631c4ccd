# SPDX-License-Identifier: Apache-2.0
"""Texts of the command line beyond its options: for --help, the manual page and docs/cli.md.

Every example is one that the parser takes (a test holds it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from textwrap import fill
from typing import Final

_AWAY = "the agent does not answer, or does not know the pod"
_NOT_BEGUN = "it could not start"
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
        """The text above the options."""
        return "\n\n".join(fill(one, WIDTH) for one in self.paragraphs)

    @property
    def epilog(self) -> str:
        """The text below the options."""
        text = []
        if self.examples:
            width = max(map(len, self.examples))
            text.append("\n".join(["examples:", *(f"  sluice {a:<{width}}  {b}" for a, b in self.examples.items())]))
        if self.codes:
            text.append("\n".join(["exit codes:", *(f"  {code:<4}{meaning}" for code, meaning in self.codes.items())]))
        return "\n\n".join(text)


EXIT_CODES: Final[Mapping[int, str]] = {
    0: "success",
    1: "something examined is wrong: drift, or a failed check",
    2: "the command could not do its work; one line on standard error says why and what to do",
    130: "ended by Ctrl-C",
}
ENVIRONMENT: Final[Mapping[str, str]] = {
    "SLUICE_RUN_DIR": "the agent's directory, as --run-dir",
    "SLUICE_BPF_DIR": "bpffs directory of backend ebpf, as --bpf-dir",
    "SLUICE_CONFIG": "file of settings, as --config",
    "SLUICE_<SETTING>": "any setting, as in SLUICE_BACKEND=ebpf; a flag wins over it, and it wins over the file",
}
FILES: Final[Mapping[str, str]] = {
    "/run/sluice/agent.sock": "admin API of the agent for these commands; for root only",
    "/run/sluice/cni.sock": "socket on which the CNI plugin calls the agent",
    "/run/sluice/pods, netns, exempt": "state of pods for the next agent, and for the plugin without an agent",
    "/run/sluice/events.jsonl": "the history that `sluice events` shows; for root only",
    "/sys/fs/bpf/sluice": "pins of backend ebpf and of the accounting",
    "/var/run/ztunnel/ztunnel.sock": "socket to which ztunnel connects",
}
TOP: Final = "\n\n".join(
    "\n".join([f"{title}:", *(f"  {key!s:<{width}}  {words}" for key, words in rows.items())])
    for title, width, rows in (("Exit codes", 4, EXIT_CODES), ("Environment", 16, ENVIRONMENT), ("Files", 31, FILES))
)

PAGES: Final[Mapping[str, Page]] = {
    "status": Page(
        "Shows the agent of this node: version, backend and the reason for it, fates of connections, ztunnels, pods.",
        {"status": "as a list", "status -o json": "for programs"},
        {0: "the agent answered, ready or not", 2: "it does not answer"},
    ),
    "pods": Page(
        "Lists the pods of this node, whether each is captured, and why or why not.\n\n"
        "States: enabled (its rules are verified, and ztunnel listens in it), pending (its rules hold, but ztunnel "
        "does not listen in it: its connections are refused), stalled (ztunnel listens in it, but has not accepted "
        "connections of it for 3 s: they hang), excluded, failed (see REASON), waiting (the agent has not examined it "
        "yet, or it runs and gets its rules once ztunnel listens in it, after 30 s at the latest).",
        {"pods": "all of this node", "pods -n shop": "of one namespace", "pods -o json": "for programs"},
        {0: "the agent answered", 2: "it does not answer"},
    ),
    "explain": Page(
        "Explains why a pod is captured or not, and whether the kernel agrees. The first three lines give the result "
        "and what to do; then come every label, annotation and setting considered, with an arrow at the deciding "
        "one; each option and its origin; desired and actual state of every layer, ztunnel, its listeners, the node's "
        "probes; the fates of the latest connections; the latest repairs and events, and the processes "
        "that made them necessary.",
        {
            "explain shop/web": "by namespace and name",
            "explain web": "by its name, if it is unique on this node",
            "explain -n shop web": "with kubectl's syntax",
            "explain shop/web -o json": "for programs",
        },
        {0: "the pod is known here, captured or not", 2: _AWAY},
    ),
    "connections": Page(
        "Lists connections of pods: the live ones, the latest ended ones, and with --follow each that ends.\n\n"
        "Fates: captured (through ztunnel), exempt (rightly not; the reason is in brackets), leaked (should have been "
        "captured and was not), undecided (failed before that was known).\n\n"
        "With --wire, ztunnel's own pages (127.0.0.1:15000 and 15020 in its namespace) say how it forwarded captured "
        "connections: hbone, plaintext or unknown. Ended ones are known for a minute, if all between the same ends "
        "went the same way, and none from there to an address outside of the mesh.",
        {
            "connections": "of all pods: the last 20 that ended, and the live ones",
            "connections shop/web": "of one pod",
            "connections --fate leaked -n 100": "connections that bypassed ztunnel",
            "connections --wire": "encrypted or not, and to which identity",
            "connections --follow -o json": "a line of JSON each, until Ctrl-C",
        },
        {0: "the agent answered", 2: _AWAY + ", or ended while --follow ran", 130: "--follow was ended by Ctrl-C"},
    ),
    "dns": Page(
        "Lists the last DNS queries of pods, and says what stands out: resolvers without an answer, names that do not "
        "exist because a search domain was added, queries that were not captured. With --follow each query is printed "
        "once it has its answer, or has waited for 5 s. The agent keeps the last 128 queries of each pod. Times "
        "are in UTC.",
        {
            "dns": "of all pods: the last 20",
            "dns shop/web --last 100": "of one pod",
            "dns --follow -o jsonl": "a line of JSON each, until Ctrl-C",
        },
        {0: "the agent answered", 2: _AWAY + ", or ended while --follow ran", 130: "--follow was ended by Ctrl-C"},
    ),
    "events": Page(
        "Shows what happened to the pods of this node and to its parts, also before the agent was restarted: from the "
        "agent, or from its file while no agent runs. Times are in UTC.\n\n"
        "Kinds: enrolled, excluded, refused (the pod does not start, or its annotations cannot be used), failed, "
        "repaired (BY names the process that made it necessary), conflict, stalled, resumed, leaked, canary; and of "
        "the node agent-started, agent-stopped, backend-switched, ztunnel-connected, ztunnel-disconnected, "
        "cni-rewritten.\n\n"
        "The same event within five minutes is counted as a repetition. The history is limited (setting "
        "history_bytes); no pod pushes out the events of another.",
        {
            "events": "all that is known",
            "events shop/web": "of one pod, also if it is gone",
            "events --since 2026-11-21T03:00Z --until 2026-11-21T03:15Z": "of a quarter of an hour",
            "events --since 10m --follow": "of the last ten minutes, then each that happens",
            "events -o jsonl": "a line of JSON each",
        },
        {0: "the agent answered, or its file was read", 2: "neither", 130: "--follow was ended by Ctrl-C"},
    ),
    "verify": Page(
        "Compares desired and actual state, pod by pod; with --all also the node's own parts. "
        "Made for pipelines: after an upgrade of the CNI, the kernel or Sluice, run it and look at the exit code.",
        {
            "verify --all": "everything on this node",
            "verify shop/web": "one pod",
            "verify shop/web --repair": "repair what differs, then compare again",
            "verify --all -o json": "for programs: differences and the scripts that would repair them",
        },
        {0: "no drift", 1: "drift", 2: "something could not be examined; or " + _AWAY},
    ),
    "diff": Page(
        "Prints what a repair would change in a pod, as the backend's own script. Changes nothing.",
        {"diff shop/web": "prints nothing if nothing differs", "diff shop/web -o json": "for programs"},
        {0: "no drift", 1: "drift", 2: "the pod could not be examined; or " + _AWAY},
    ),
    "doctor": Page(
        "Checks this node for everything known to break capture, and says what is wrong, why, and which command helps. "
        "Changes nothing. Without an agent it runs those that need none. Run it as root in the node's PID namespace.",
        {
            "doctor": "all checks",
            "doctor --list": "the checks, and what each is about",
            "doctor -o json": "for programs",
        },
        {0: "nothing is wrong; there may be warnings", 1: "something is wrong", 2: "it could not run"},
    ),
    "report": Page(
        "Writes a support bundle into one file: the output of the other commands, rules, logs and settings, without "
        "secrets. Its MANIFEST lists the content; read it before you send it.",
        {
            "report": "of this node, into the current directory",
            "report --pod shop/web": "with only this pod",
            "report --addresses hashed": "with each address replaced by the same word everywhere",
        },
        {0: "written; missing parts are listed", 2: "it could not be written"},
    ),
    "preflight": Page(
        "Tries in a temporary network namespace what this node's kernel can do for each backend, and shows which "
        "backend an agent would choose. Needs no agent, changes nothing.",
        {"preflight": "what an agent would choose", "preflight --backend ebpf": "whether this one can be used"},
        {0: "a backend can be used", 1: "something needed is missing; the output says what to do", 2: _NOT_BEGUN},
    ),
    "rules": Page("Prints rules, without an agent and without changing anything."),
    "rules render": Page(
        "Prints the rules of a variant as the backend's own script.",
        {
            "rules render --backend nftables": "of a pod with default settings",
            "rules render --backend iptables --no-ipv6": "of a pod without IPv6",
            "rules render --backend nftables --dns-to 10.96.0.10": "with DNS capture only towards this resolver",
        },
        {0: "printed", 2: "there is no such variant"},
    ),
    "install": Page(
        "Installs the CNI plugin and its configuration once, as an agent does continuously. Needs no agent.",
        {"install": "install them", "install --check": "change nothing, only report"},
        {0: "installed", 1: "not installed", 2: "it could not be done"},
    ),
    "uninstall": Page(
        "Removes the CNI plugin and its configuration from this node; new pods start as if Sluice had never been here. "
        "`sluice uncapture` removes the rules in pods. The agent must not run: it would install everything again.",
        {"uninstall --dry-run": "only show what would be done", "uninstall": "do it"},
        {0: "no configuration names the plugin", 1: "something could not be done", 2: _NOT_BEGUN},
    ),
    "uncapture": Page(
        "Removes all rules of Sluice from this node, pod by pod. Needs no agent, no API server and no state: it "
        "removes what it finds in the namespaces. The agent must not run: it would restore everything.",
        {
            "uncapture --all --dry-run": "only show what would be removed; an agent may run",
            "uncapture --all": "remove it",
            "uncapture --all --annotations --config /etc/sluice/sluice.yaml": "in a cluster: also the pods' annotation",
            "uncapture --all --netns /run/netns/web-0": "only in this namespace",
        },
        {0: "nothing of Sluice is left", 1: "something is left", 2: _NOT_BEGUN},
    ),
    "handback": Page(
        "Converts the rules of captured pods to those of istio-cni, and forgets the pods. They stay captured.",
        {"handback --all --dry-run": "only show what would be changed", "handback --all": "do it"},
        {0: "all pods are handed back", 1: "some pods are not", 2: _NOT_BEGUN},
    ),
    "migrate": Page(
        "Migrates this node from istio-cni to Sluice, and back; no pod starts uncaptured in between. After an "
        "interruption, run the command again to continue.",
        {
            "migrate --check": "only check: obstacles, and what will differ",
            "migrate --check --values values.yaml": "with istio-cni's own settings",
            "migrate --take-over": "Sluice's entry first, then remove that of istio-cni",
            "migrate --back --dry-run": "the steps back",
        },
        {0: "it can be done, or is done", 1: "an obstacle or a step is left; the output names it", 2: _NOT_BEGUN},
    ),
    "agent": Page(
        "Runs the node agent: takes pods from the CNI plugin, from Kubernetes and from the static file, programs their "
        "namespaces, hands them to ztunnel and repairs drift. SIGTERM and SIGINT end it and leave every "
        "rule in place. Settings are read once, at its start.",
        {
            "agent --config /etc/sluice/sluice.yaml": "settings from a file",
            "agent --backend nftables --log-level debug": "settings as flags, which override file and environment",
        },
        {0: "it was stopped", 1: "a defect ended it; see its log", 2: "it cannot run with these settings or here"},
    ),
    "ztunnel": Page(
        "Runs the embedded layer 4 proxy until it is stopped. It relays and counts connections; with --mesh and "
        "--identities it encrypts them.",
        {"ztunnel --records -": "with one JSON line per connection on standard output"},
        {0: "it was stopped", 2: "it cannot run with these settings or here"},
    ),
    "lab": Page(
        "Builds nodes and pods in network namespaces of this machine for experiments. Nothing outside them is changed."
    ),
    "lab demo": Page(
        "Shows and proves the main job with real traffic. Leaves nothing behind.",
        {"lab demo": "with nftables", "lab demo --backend ebpf": "with eBPF"},
        {0: "every claim held", 1: "a claim did not hold", 2: "the lab could not be built"},
    ),
    "lab up": Page(
        "Builds the lab and leaves it running. Pods have identities; connections between enrolled ones go by HBONE.",
        {"lab up": "two nodes, pods, agents, ztunnels", "lab up --without-sluice": "plain pods, for comparison"},
        {0: "it runs", 2: "it could not be built"},
    ),
    "lab down": Page("Removes the lab, even one that is half built.", {"lab down": "all of it"}, {0: "it is gone"}),
    "lab exec": Page(
        "Runs a command in a pod of the lab.",
        {"lab exec shop/client -- ip address": "the network as this pod sees it"},
        {0: "as the command: its exit code is that of this one", 2: "there is no such pod, or no command"},
    ),
    "lab pods": Page("Lists the pods of the lab, with addresses.", {"lab pods": ""}, {0: "listed", 2: "no lab is up"}),
    "help": Page(
        "Shows the help of a command, like its option --help; without a command, the help of the program.",
        {"help explain": "as sluice explain --help", "help lab up": "of a command in a group"},
        {0: "printed", 2: "there is no such command"},
    ),
    "version": Page("Shows the version of this program. `sluice status` shows the version of the running agent.",
                    {"version": "", "version -o json": "for programs"}, {0: "printed"}),
    "completion": Page(
        "Prints a script for shell completion of commands, options, their values and POD; for POD it asks the agent. "
        "`pods` prints the possible names of POD for these scripts; nothing if no agent answers within a second.",
        {
            "completion bash >/etc/bash_completion.d/sluice": "bash, for all users",
            "completion zsh >/usr/local/share/zsh/site-functions/_sluice": "zsh",
            "completion fish >/etc/fish/completions/sluice.fish": "fish",
        },
        {0: "printed"},
    ),
}  # fmt: skip
