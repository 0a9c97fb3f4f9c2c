//! A command for a guest: what to run, as whom, where, and its OCI form.

use super::Error;
use crate::proto::oci::{Box as Size, Linux, LinuxNamespace, Mount, Process, Root, Spec, User};

/// Annotation for the guest agent: a small init before the program.
const REAPER: &str = "io.vmcache.init";
/// Who a command runs as that names nobody.
const ROOT: &str = "0";
/// PATH of a command that brings none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program to run in a guest. By default it runs as root in `/`, with a PATH
/// and nothing else in its environment, and three pipes as its streams.
#[derive(Clone, Debug)]
pub struct Command {
    args: Vec<String>,
    env: Vec<String>,
    cwd: String,
    user: String,
    terminal: Option<(u16, u16)>,
}

impl Command {
    /// Runs `program`, found by the guest's PATH when it has no slash.
    pub fn new(program: impl Into<String>) -> Command {
        Command {
            args: vec![program.into()],
            env: Vec::new(),
            cwd: "/".into(),
            user: String::new(),
            terminal: None,
        }
    }

    /// Adds an argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Command {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Command {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment, in place of an earlier value.
    pub fn env(self, key: &str, value: &str) -> Command {
        let mut command = self.env_remove(key);
        command.env.push(format!("{key}={value}"));
        command
    }

    /// Takes back a variable that was set.
    pub fn env_remove(mut self, key: &str) -> Command {
        self.env.retain(|e| e.split_once('=').is_none_or(|(k, _)| k != key));
        self
    }

    /// Sets a variable, unless it is set.
    pub fn env_or(self, key: &str, value: &str) -> Command {
        match self.env.iter().any(|e| e.split_once('=').is_some_and(|(k, _)| k == key)) {
            true => self,
            false => self.env(key, value),
        }
    }

    /// What no system call takes: a NUL, by which a text would end early.
    ///
    /// # Errors
    /// [`Error::Command`] names it; so does a user or group whose number is out of range.
    pub(super) fn check(&self) -> Result<(), Error> {
        let refused = |text| Error::Command { text };
        crate::ids::check(&self.user).map_err(refused)?;
        let all = self.args.iter().map(|t| ("argument", t));
        let mut all =
            all.chain(self.env.iter().map(|t| ("variable", t))).chain([("directory", &self.cwd)]);
        match all.find(|(_, text)| text.contains('\0')) {
            None => Ok(()),
            Some((what, text)) => Err(refused(format!("{what} {text:?}: contains a NUL"))),
        }
    }

    /// Its working directory in the guest.
    pub fn workdir(mut self, dir: impl Into<String>) -> Command {
        self.cwd = dir.into();
        self
    }

    /// Its user, `user[:group]`, names or numbers, as the guest's own files know them.
    pub fn user(mut self, user: impl Into<String>) -> Command {
        self.user = user.into();
        self
    }

    /// Gives it a terminal of so many rows and columns; its stderr is then its stdout.
    pub fn terminal(mut self, rows: u16, columns: u16) -> Command {
        self.terminal = Some((rows, columns));
        self
    }

    /// Whether it has a terminal.
    pub fn is_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// The process of its OCI form.
    pub(super) fn process(&self) -> Process {
        let mut env = self.env.clone();
        if !env.iter().any(|e| e.starts_with("PATH=")) {
            env.insert(0, PATH.to_string());
        }
        if self.terminal.is_some() && !env.iter().any(|e| e.starts_with("TERM=")) {
            env.push("TERM=xterm".to_string());
        }
        let size = self.terminal.map(|(rows, columns)| Size {
            Height: rows.into(),
            Width: columns.into(),
            ..Size::default()
        });
        // By its number, so that its groups are looked up as another's are.
        let name = if self.user.is_empty() { ROOT } else { &self.user };
        let user = User { Username: name.to_string(), ..User::default() };
        Process {
            Terminal: self.terminal.is_some(),
            ConsoleSize: size.into(),
            User: Some(user).into(),
            Args: self.args.clone(),
            Env: env,
            Cwd: self.cwd.clone(),
            ..Process::default()
        }
    }

    /// Its OCI form, with a root in the guest. The VM is what isolates, so the
    /// container has all capabilities.
    pub(super) fn spec(&self, root: &str, memory_mib: u32) -> Spec {
        let namespace = |kind: &str| LinuxNamespace { Type: kind.into(), ..Default::default() };
        let linux = Linux {
            Namespaces: ["pid", "mount", "uts", "ipc"].into_iter().map(namespace).collect(),
            ..Linux::default()
        };
        let mut spec = Spec {
            Version: "1.0.2".into(),
            Process: Some(self.process()).into(),
            Root: Some(Root { Path: root.into(), ..Root::default() }).into(),
            Mounts: mounts(root == "/", memory_mib),
            Linux: Some(linux).into(),
            ..Spec::default()
        };
        spec.Annotations.insert(REAPER.into(), "true".into());
        spec
    }
}

/// Largest /dev/shm, as docker's, MiB.
const MAX_SHM: u32 = 64;

/// The guest's own root has everything but a /proc of the new pid namespace;
/// any other needs it all. Half of the memory is a root's: what is mounted on it is small
/// enough for the VM to live when all of it is full.
fn mounts(own: bool, memory_mib: u32) -> Vec<Mount> {
    let shm = format!("nosuid,noexec,nodev,mode=1777,size={}m", (memory_mib / 8).clamp(4, MAX_SHM));
    let all = [
        ("/proc", "proc", "nosuid,noexec,nodev"),
        ("/dev", "tmpfs", "nosuid,strictatime,mode=755,size=4m"),
        ("/dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("/dev/shm", "tmpfs", shm.as_str()),
        ("/sys", "sysfs", "nosuid,noexec,nodev"),
        ("/sys/fs/cgroup", "cgroup2", "nosuid,noexec,nodev,relatime"),
    ];
    all.into_iter()
        .take(if own { 1 } else { all.len() })
        .map(|(target, kind, options)| Mount {
            destination: target.into(),
            source: kind.into(),
            type_: kind.into(),
            options: options.split(',').map(str::to_string).collect(),
            ..Mount::default()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_becomes_a_spec() {
        let c = Command::new("ls").arg("-l").env("A", "b").workdir("/tmp").user("1:2");
        let spec = c.terminal(24, 80).spec("/r", 256);
        let p = spec.Process.unwrap();
        assert_eq!(p.Args, ["ls", "-l"]);
        assert!(p.Env.contains(&"A=b".to_string()) && p.Env[0].starts_with("PATH="));
        assert!(p.Env.contains(&"TERM=xterm".to_string()));
        assert_eq!((p.Cwd.as_str(), p.User.Username.as_str()), ("/tmp", "1:2"));
        assert_eq!(p.ConsoleSize.Width, 80);
        assert_eq!(spec.Mounts.len(), 6);
        let plain = Command::new("x").spec("/", 256);
        assert_eq!(plain.Mounts.len(), 1);
        assert_eq!(plain.Process.User.Username, "0");
    }

    #[test]
    fn a_variable_has_one_value_the_last() {
        let c = Command::new("x").env("A", "1").env("AB", "2").env("A", "3").env_or("A", "4");
        assert_eq!(c.env_or("C", "5").env, ["AB=2", "A=3", "C=5"]);
    }

    #[test]
    fn what_no_system_call_takes_is_refused_by_name() {
        let refused = |c: Command| c.check().unwrap_err().to_string();
        assert!(refused(Command::new("a\0b")).contains("\"a\\0b\""));
        assert!(refused(Command::new("a").env("K", "\0")).contains("variable"));
        assert!(refused(Command::new("a").workdir("/\0")).contains("directory"));
        assert!(refused(Command::new("a").user("4294967295")).contains("4294967295"));
        Command::new("a").user("7:8").check().unwrap();
    }
}
