"What several test files need: children that run, and die, at a chosen moment."
import os, signal, sys

def forked(work):
    "The exit status of `work()` in a forked child"
    pid = os.fork()
    if pid: return os.waitpid(pid, 0)[1]
    try: work(); os._exit(0)
    except BaseException: os._exit(1)

def killed_at(k, work):
    "Kill a child with SIGKILL at its k-th file operation; whether it came to that"
    def run():
        left = [k]
        def hook(event, args):
            if event.split('.')[0] not in ('open', 'os', 'shutil') or left[0]<0: return
            left[0] -= 1
            if left[0]<0: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        work()
    return os.WIFSIGNALED(forked(run))
