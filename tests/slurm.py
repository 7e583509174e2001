"""A real Slurm of two virtual nodes in a folder of its own, for tests: no root services, no accounting, gone when the tests end."""
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin"
GPUS = 8
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
SlurmdTimeout=60
MailProg={folder}/mail
PropagateResourceLimits=NONE
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=32 RealMemory=500000 Gres=gpu:a100:8 State=UNKNOWN\n"
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def missing_programs():
    "What Debian's slurmctld, slurmd, slurm-client and munge would bring."
    return [name for name in (*DAEMONS, "sbatch") if not shutil.which(name, path=PATH)]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    "Starts with `with`; `call` runs a command that sees this Slurm and no other."

    def __init__(self, nodes=("n1", "n2")):
        self.nodes, self.daemons = nodes, {}

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_"))
        self.folder.chmod(0o755)  # munged refuses a folder that others can't see
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.environment = {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}
        try:
            self.write_files()
            self.start("munged", "munged", "-F", f"--socket={self.folder}/munge.socket", f"--key-file={self.folder}/munge.key",
                       f"--pid-file={self.folder}/munge.pid", f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed")
            self.wait_until(lambda: (self.folder / "munge.socket").exists(), "munged")
            self.start("slurmctld", "slurmctld", "-D", "-i")
            for name in self.nodes:
                self.start_node(name)
            self.wait_until(lambda: self.call("sinfo", "-h", "-N", "-o", "%t").stdout.split() == ["idle"] * len(self.nodes), "nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if "slurmctld" in self.daemons:
            self.call("scancel", "--full", "-s", "KILL", "-u", getpass.getuser())
            self.call("scancel", "-u", getpass.getuser())
            with suppress(TimeoutError):
                self.wait_until(lambda: not self.call("squeue", "-h").stdout.strip(), "jobs that end", 10)
        for process in reversed(self.daemons.values()):
            process.terminate()
        for process in self.daemons.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
        for pid in self.leftovers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def write_files(self):
        folder, (port, *ports) = self.folder, free_ports(1 + len(self.nodes))
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        (folder / "state").mkdir()
        nodes = "".join(NODE.format(name=name, port=port) for name, port in zip(self.nodes, ports))
        partition = f"PartitionName=gpu-a100 Nodes={','.join(self.nodes)} Default=YES MaxTime=12:00:00 State=UP\n"
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, user=getpass.getuser(), port=port) + nodes + partition)
        for number in range(GPUS):
            (folder / f"gpu{number}").symlink_to("/dev/null")  # a GPU has to be a device
        (folder / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu Type=a100 File={folder}/gpu[0-{GPUS - 1}]\n")
        (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ("localhost", socket.gethostname(), *self.nodes)))
        (folder / "mail").write_text(f'#!/bin/sh\necho "$@" >> {folder}/mail.log\ncat > /dev/null\n')
        (folder / "mail").chmod(0o755)

    def start(self, name, *command):
        log = open(self.folder / f"{name}.out", "ab")
        with log:
            self.daemons[name] = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL,
                                                  stdout=log, stderr=log, start_new_session=True)

    def start_node(self, name):
        "A slurmd that believes to be alone on a machine of this name."
        (self.folder / f"spool_{name}").mkdir(exist_ok=True)
        own = ["unshare", "--mount", "--uts", *([] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"])]
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && exec slurmd -D -N "$1"'
        self.start(name, *own, "sh", "-c", script, "sh", name, str(self.folder / "hosts"))

    def break_node(self, name, number):
        "The machine of a job loses its power: slurmd and the job are gone at once, and Slurm finds out."
        self.daemons.pop(name).kill()
        stewards = subprocess.run(["pgrep", "-f", rf"^slurmstepd: \[{number}\."], capture_output=True, text=True).stdout.split()
        for pid in [*map(int, stewards), *self.processes(f"SLURM_JOB_ID={number}")]:  # who would report the end first
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.call("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=power")

    def stop_daemon(self, name):
        "Only slurmd dies; the job doesn't notice."
        process = self.daemons.pop(name)
        process.kill()
        process.wait()

    def mend_node(self, name):
        self.start_node(name)
        self.call("scontrol", "update", f"NodeName={name}", "State=RESUME")

    def call(self, *command, timeout=60, **environment):
        return subprocess.run([str(part) for part in command], env={**self.environment, **environment}, capture_output=True, text=True, timeout=timeout)

    def wait_until(self, condition, what, seconds=60):
        end = time.monotonic() + seconds
        while not condition():
            dead = [name for name, process in self.daemons.items() if process.poll() is not None]
            if dead:
                raise RuntimeError(f"{dead[0]} ended: {(self.folder / f'{dead[0]}.out').read_text()[-1500:]}")
            if time.monotonic() > end:
                raise TimeoutError(f"{what} took more than {seconds} seconds")
            time.sleep(0.2)

    def job(self, number):
        "What Slurm says of a job."
        shown = self.call("scontrol", "-o", "show", "job", number).stdout
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)

    def wait_for(self, number, states=FINAL, seconds=240):
        "Wait until a job is in one of these states; a requeued job need not sit out its two minutes."
        def there():
            job = self.job(number)
            if job.get("JobState") == "PENDING" and "PENDING" not in states and job["StartTime"] > time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 5)):
                time.sleep(2)  # a job that starts in the second in which it was stopped is taken for the one that was stopped
                self.call("scontrol", "update", f"JobId={number}", "StartTime=now")
            return job.get("JobState") in states
        try:
            self.wait_until(there, f"job {number}", seconds)
        except TimeoutError as error:
            job = self.job(number)
            raise TimeoutError(f"{error}; it is {job.get('JobState')}, {job.get('Reason')}, from {job.get('StartTime')}, wanted {states}") from None
        return self.job(number)

    def processes(self, variable="SLURM_CONF="):
        "Processes of this cluster's jobs, and of one job if a variable names it."
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (place / "environ").read_bytes().decode(errors="replace").split("\0")
                ours = f"SLURM_CONF={self.folder}/slurm.conf" in environment and any(v.startswith("SLURM_JOB_ID=") for v in environment)
                if ours and any(v.startswith(variable) for v in environment):
                    found.append(int(place.name))
        return found

    def leftovers(self):
        "What is still there after the end: processes of jobs, and daemons, which work in the cluster's folder."
        daemons = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(place / "cwd") == str(self.folder):
                    daemons.append(int(place.name))
        return sorted({*self.processes(), *daemons} - {os.getpid()})
