//! Filters of system calls (seccomp): what a process may not ask of the kernel.
//!
//! A [`Filter`] refuses the calls that it names and lets all others through. It is compiled
//! before the fork; [`Filter::install`] makes system calls only, and is for the child.
//!
//! Invariants: a call by another ABI of the processor (32 bit, x32) ends the process or is
//! refused; calls that are newer than `NEWEST` are refused as if the kernel lacked them,
//! so that no list is out of date on a newer kernel.
//!
//! Does not: decide what is refused; look into memory (a call's structures are not filtered).
//!
//! Source: Linux's Documentation/userspace-api/seccomp_filter.rst; calls by their names in
//! syscalls(2).

use std::collections::BTreeMap;
use std::io;

use nix::errno::Errno;
use seccompiler::{
    sock_filter, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Stands for the process's own pid, which is not known before the fork.
const OWN_PID: u32 = 0x5eed_0b1d;
/// The newest call that is let through unless it is refused: futex_requeue, of Linux 6.7; the
/// next two tell of mounts. The
/// numbers of newer calls are the same on all architectures.
const NEWEST: u32 = 456;

/// How an argument is compared; calls for which it holds are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// It is this, 32 bits wide.
    Is(u32),
    /// It is anything else, 32 bits wide.
    IsNot(u32),
    /// It is another process than this one (a pid).
    IsNotOwnPid,
    /// It is no null pointer.
    NotNull,
    /// Under this mask (the first) it is this.
    Masked(u64, u64),
}

impl When {
    fn condition(self, argument: u8) -> Result<SeccompCondition, seccompiler::BackendError> {
        use SeccompCmpArgLen::{Dword, Qword};
        let (length, compare, value) = match self {
            When::Is(n) => (Dword, SeccompCmpOp::Eq, n.into()),
            When::IsNot(n) => (Dword, SeccompCmpOp::Ne, n.into()),
            When::IsNotOwnPid => (Dword, SeccompCmpOp::Ne, OWN_PID.into()),
            When::NotNull => (Qword, SeccompCmpOp::Ne, 0),
            When::Masked(mask, n) => (Qword, SeccompCmpOp::MaskedEq(mask), n),
        };
        SeccompCondition::new(argument, length, compare, value)
    }
}

/// A refusal being put together.
#[derive(Debug)]
pub struct Refusals {
    errno: Errno,
    rules: BTreeMap<i64, Vec<SeccompRule>>,
}

impl Refusals {
    /// None yet; those to come are answered with this error.
    pub fn new(errno: Errno) -> Refusals {
        Refusals { errno, rules: BTreeMap::new() }
    }

    /// Refuses a call whatever its arguments; nothing where this architecture lacks it.
    pub fn always(&mut self, call: &str) {
        if let Some(number) = number(call) {
            // No rule: any arguments.
            self.rules.insert(number, Vec::new());
        }
    }

    /// Refuses a call when all of this holds of its arguments (from 0).
    ///
    /// # Errors
    /// When a system call has no such argument.
    pub fn when(&mut self, call: &str, arguments: &[(u8, When)]) -> io::Result<()> {
        let Some(number) = number(call) else { return Ok(()) };
        let conditions: Result<Vec<_>, _> =
            arguments.iter().map(|(n, when)| when.condition(*n)).collect();
        let rule = conditions.and_then(SeccompRule::new).map_err(io::Error::other)?;
        match self.rules.get_mut(&number) {
            // It is refused whatever its arguments.
            Some(rules) if rules.is_empty() => {}
            Some(rules) => rules.push(rule),
            None => drop(self.rules.insert(number, vec![rule])),
        }
        Ok(())
    }

    fn compiled(self) -> io::Result<BpfProgram> {
        let refuse = SeccompAction::Errno(self.errno as u32);
        let filter = SeccompFilter::new(self.rules, SeccompAction::Allow, refuse, architecture()?);
        filter.and_then(TryInto::try_into).map_err(io::Error::other)
    }
}

fn architecture() -> io::Result<TargetArch> {
    std::env::consts::ARCH.try_into().map_err(io::Error::other)
}

/// Programs for the kernel, in the order in which they are installed.
#[derive(Clone, Debug)]
pub struct Filter {
    programs: Vec<BpfProgram>,
}

impl Filter {
    /// Of these refusals, and of all calls that are newer than is known here.
    ///
    /// # Errors
    /// When they do not fit a program.
    pub fn of(refusals: Vec<Refusals>) -> io::Result<Filter> {
        let mut programs = vec![no_newer_calls()];
        for some in refusals {
            programs.push(some.compiled()?);
        }
        Ok(Filter { programs })
    }

    /// Puts it in force for this process and all that it starts, for good. It needs
    /// no_new_privs or CAP_SYS_ADMIN. System calls only: for a child before exec.
    ///
    /// # Errors
    /// As seccomp(2); the process must then end.
    pub fn install(&mut self) -> io::Result<()> {
        // SAFETY: takes nothing and changes nothing.
        let own = unsafe { libc::getpid() } as u32;
        for program in &mut self.programs {
            for step in program.iter_mut().filter(|step| step.k == OWN_PID) {
                step.k = own;
            }
            let whole = libc::sock_fprog {
                len: u16::try_from(program.len()).unwrap_or(u16::MAX),
                filter: program.as_mut_ptr().cast(),
            };
            let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, 0);
            // SAFETY: `whole` describes the program, which outlives the call; sock_filter has
            // the kernel's layout in both crates.
            let done = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const whole) };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

/// The program that answers ENOSYS to calls above [`NEWEST`]. On x86-64, the calls of x32 have
/// numbers above it, too.
fn no_newer_calls() -> BpfProgram {
    let step = |code: u32, jt, jf, k| sock_filter { code: code as u16, jt, jf, k };
    vec![
        // seccomp_data.nr, its first word.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K, 0, 1, NEWEST),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | Errno::ENOSYS as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

macro_rules! calls {
    ($($(#[$on:meta])* $name:literal $number:expr;)*) => {
        /// Calls that a filter can name, and their numbers here.
        static CALLS: &[(&str, libc::c_long)] = &[$($(#[$on])* ($name, $number)),*];
    };
}

/// The number of a call on this architecture; `None` where it lacks that, or the table does.
pub fn number(call: &str) -> Option<i64> {
    CALLS.iter().find(|(name, _)| *name == call).map(|(_, number)| *number)
}

calls! {
    "accept" libc::SYS_accept;
    "accept4" libc::SYS_accept4;
    "acct" libc::SYS_acct;
    "add_key" libc::SYS_add_key;
    "adjtimex" libc::SYS_adjtimex;
    "bind" libc::SYS_bind;
    "bpf" libc::SYS_bpf;
    #[cfg(target_arch = "x86_64")] "chmod" libc::SYS_chmod;
    #[cfg(target_arch = "x86_64")] "chown" libc::SYS_chown;
    "chroot" libc::SYS_chroot;
    "clock_adjtime" libc::SYS_clock_adjtime;
    "clock_settime" libc::SYS_clock_settime;
    "clone" libc::SYS_clone;
    "clone3" libc::SYS_clone3;
    "connect" libc::SYS_connect;
    "delete_module" libc::SYS_delete_module;
    "execveat" libc::SYS_execveat;
    "fanotify_init" libc::SYS_fanotify_init;
    "fanotify_mark" libc::SYS_fanotify_mark;
    "fchmod" libc::SYS_fchmod;
    "fchmodat" libc::SYS_fchmodat;
    "fchmodat2" 452;
    "fchown" libc::SYS_fchown;
    "fchownat" libc::SYS_fchownat;
    "fcntl" libc::SYS_fcntl;
    "finit_module" libc::SYS_finit_module;
    #[cfg(target_arch = "x86_64")] "fork" libc::SYS_fork;
    "fremovexattr" libc::SYS_fremovexattr;
    "fsconfig" libc::SYS_fsconfig;
    "fsetxattr" libc::SYS_fsetxattr;
    "fsmount" libc::SYS_fsmount;
    "fsopen" libc::SYS_fsopen;
    "fspick" libc::SYS_fspick;
    #[cfg(target_arch = "x86_64")] "futimesat" libc::SYS_futimesat;
    "init_module" libc::SYS_init_module;
    #[cfg(target_arch = "x86_64")] "inotify_init" libc::SYS_inotify_init;
    "inotify_init1" libc::SYS_inotify_init1;
    "io_setup" libc::SYS_io_setup;
    "io_uring_enter" libc::SYS_io_uring_enter;
    "io_uring_register" libc::SYS_io_uring_register;
    "io_uring_setup" libc::SYS_io_uring_setup;
    "ioctl" libc::SYS_ioctl;
    #[cfg(target_arch = "x86_64")] "ioperm" libc::SYS_ioperm;
    #[cfg(target_arch = "x86_64")] "iopl" libc::SYS_iopl;
    "ioprio_set" libc::SYS_ioprio_set;
    "kcmp" libc::SYS_kcmp;
    #[cfg(target_arch = "x86_64")] "kexec_file_load" libc::SYS_kexec_file_load;
    "kexec_load" libc::SYS_kexec_load;
    "keyctl" libc::SYS_keyctl;
    "kill" libc::SYS_kill;
    #[cfg(target_arch = "x86_64")] "lchown" libc::SYS_lchown;
    "listen" libc::SYS_listen;
    "lookup_dcookie" libc::SYS_lookup_dcookie;
    "lremovexattr" libc::SYS_lremovexattr;
    "lsetxattr" libc::SYS_lsetxattr;
    "migrate_pages" libc::SYS_migrate_pages;
    #[cfg(target_arch = "x86_64")] "mknod" libc::SYS_mknod;
    "mknodat" libc::SYS_mknodat;
    "mount" libc::SYS_mount;
    "mount_setattr" libc::SYS_mount_setattr;
    "move_mount" libc::SYS_move_mount;
    "move_pages" libc::SYS_move_pages;
    "mq_open" libc::SYS_mq_open;
    "mq_unlink" libc::SYS_mq_unlink;
    "msgctl" libc::SYS_msgctl;
    "msgget" libc::SYS_msgget;
    "msgrcv" libc::SYS_msgrcv;
    "msgsnd" libc::SYS_msgsnd;
    "name_to_handle_at" libc::SYS_name_to_handle_at;
    "open_by_handle_at" libc::SYS_open_by_handle_at;
    "open_tree" libc::SYS_open_tree;
    "perf_event_open" libc::SYS_perf_event_open;
    "pidfd_getfd" libc::SYS_pidfd_getfd;
    "pidfd_open" libc::SYS_pidfd_open;
    "pidfd_send_signal" libc::SYS_pidfd_send_signal;
    "pivot_root" libc::SYS_pivot_root;
    "prlimit64" libc::SYS_prlimit64;
    "process_madvise" libc::SYS_process_madvise;
    "process_mrelease" libc::SYS_process_mrelease;
    "process_vm_readv" libc::SYS_process_vm_readv;
    "process_vm_writev" libc::SYS_process_vm_writev;
    "ptrace" libc::SYS_ptrace;
    "quotactl" libc::SYS_quotactl;
    "quotactl_fd" 443;
    "reboot" libc::SYS_reboot;
    "removexattr" libc::SYS_removexattr;
    "request_key" libc::SYS_request_key;
    "rt_sigqueueinfo" libc::SYS_rt_sigqueueinfo;
    "rt_tgsigqueueinfo" libc::SYS_rt_tgsigqueueinfo;
    "sched_setaffinity" libc::SYS_sched_setaffinity;
    "sched_setattr" libc::SYS_sched_setattr;
    "sched_setparam" libc::SYS_sched_setparam;
    "sched_setscheduler" libc::SYS_sched_setscheduler;
    "semctl" libc::SYS_semctl;
    "semget" libc::SYS_semget;
    "semop" libc::SYS_semop;
    "semtimedop" libc::SYS_semtimedop;
    "sendto" libc::SYS_sendto;
    "setdomainname" libc::SYS_setdomainname;
    "sethostname" libc::SYS_sethostname;
    "setns" libc::SYS_setns;
    "setpgid" libc::SYS_setpgid;
    "setpriority" libc::SYS_setpriority;
    "settimeofday" libc::SYS_settimeofday;
    "setxattr" libc::SYS_setxattr;
    "shmat" libc::SYS_shmat;
    "shmctl" libc::SYS_shmctl;
    "shmget" libc::SYS_shmget;
    "socket" libc::SYS_socket;
    "socketpair" libc::SYS_socketpair;
    "swapoff" libc::SYS_swapoff;
    "swapon" libc::SYS_swapon;
    "syslog" libc::SYS_syslog;
    "tgkill" libc::SYS_tgkill;
    "tkill" libc::SYS_tkill;
    "truncate" libc::SYS_truncate;
    "umount2" libc::SYS_umount2;
    "unshare" libc::SYS_unshare;
    #[cfg(target_arch = "x86_64")] "uselib" libc::SYS_uselib;
    "userfaultfd" libc::SYS_userfaultfd;
    #[cfg(target_arch = "x86_64")] "utime" libc::SYS_utime;
    "utimensat" libc::SYS_utimensat;
    #[cfg(target_arch = "x86_64")] "utimes" libc::SYS_utimes;
    "vhangup" libc::SYS_vhangup;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_stand_once() {
        assert!(CALLS.windows(2).all(|w| w[0].0 < w[1].0));
        assert_eq!(number("no such call"), None);
    }

    #[test]
    fn a_call_that_is_refused_always_stays_so() {
        let mut some = Refusals::new(Errno::EPERM);
        some.always("kill");
        some.when("kill", &[(0, When::IsNotOwnPid)]).unwrap();
        some.when("fcntl", &[(1, When::Is(8))]).unwrap();
        assert!(some.rules[&number("kill").unwrap()].is_empty());
        assert!(some.when("fcntl", &[(6, When::Is(8))]).is_err(), "a call has six arguments");
        let filter = Filter::of(vec![some]).unwrap();
        assert_eq!(filter.programs.len(), 2);
    }
}
