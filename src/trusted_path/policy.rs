//! The rule itself, of one component at a time, and what is said when one does not pass.
//!
//! Invariant: nothing here asks the system; what a component is has been looked at before.

use std::error;
use std::fmt;
use std::io;
use std::path::PathBuf;

use nix::sys::stat::{FileStat, SFlag};
use nix::unistd::{getegid, geteuid};

use super::Kind;

/// For whom a path is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

impl Asker {
    pub(super) fn this_process() -> Asker {
        Asker { uid: geteuid().as_raw(), gid: getegid().as_raw() }
    }

    /// How an error names it.
    fn name(self) -> String {
        match self.uid {
            0 => "root".into(),
            uid => format!("uid {uid}"),
        }
    }
}

/// What is known of a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Type and permissions, as stat(2) has them.
    pub mode: u32,
    /// How many names it has.
    pub names: u64,
    /// Whether it has an access control list, whose mask the group's permissions then are.
    pub list: bool,
}

impl Component {
    /// By what stat(2) tells; `list` is asked only where it matters.
    pub(super) fn of(stat: &FileStat, list: impl FnOnce() -> bool) -> Component {
        let list = stat.st_mode & 0o020 != 0 && !link_or_device(stat.st_mode) && list();
        #[allow(clippy::useless_conversion)] // Of 32 bits on some machines.
        let names = u64::from(stat.st_nlink);
        Component { uid: stat.st_uid, gid: stat.st_gid, mode: stat.st_mode, names, list }
    }

    pub(super) fn is(&self, kind: SFlag) -> bool {
        SFlag::from_bits_truncate(self.mode) & SFlag::S_IFMT == kind
    }
}

/// Their permissions say nothing of who may change what a path leads to.
fn link_or_device(mode: u32) -> bool {
    let kind = SFlag::from_bits_truncate(mode) & SFlag::S_IFMT;
    [SFlag::S_IFLNK, SFlag::S_IFCHR, SFlag::S_IFBLK, SFlag::S_IFSOCK].contains(&kind)
}

/// How a component that passes stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody else may write it.
    Closed,
    /// A directory in which others make entries, and touch none but their own.
    Sticky,
}

/// Why a component does not pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is another user's.
    Owner { uid: u32, mode: u32 },
    /// Everybody may write it.
    Others { mode: u32 },
    /// A group may that others can be in.
    Group { gid: u32, mode: u32 },
    /// Its access control list may let others write it.
    List { mode: u32 },
    /// Another user's program answers for its file system.
    Mount { uid: u32 },
    /// Others make entries there, and a directory of one's own is wanted.
    Shared { mode: u32 },
    /// It is not there, and others could make it.
    Missing,
    /// It is something else than is wanted.
    Kind { is: &'static str, wanted: &'static str },
    /// A link, where something is to be written.
    Link,
    /// Other names of the file would get what is written.
    Names(u64),
    /// The path has too many components.
    Deep(usize),
}

/// Whether a component may be on a path, for whoever asks.
///
/// # Errors
/// Why not.
pub fn acceptable(asker: Asker, component: &Component) -> Result<Standing, Fault> {
    let Component { gid, mode, list, .. } = *component;
    ours(asker, component)?;
    if link_or_device(mode) {
        return Ok(Standing::Closed);
    }
    let own_group = gid == 0 || gid == asker.gid;
    let fault = match (mode & 0o002 != 0, mode & 0o020 != 0) {
        (true, _) => Fault::Others { mode },
        (false, true) if list => Fault::List { mode },
        (false, true) if !own_group => Fault::Group { gid, mode },
        _ => return Ok(Standing::Closed),
    };
    match component.is(SFlag::S_IFDIR) && mode & 0o1000 != 0 {
        true => Ok(Standing::Sticky),
        false => Err(fault),
    }
}

/// Whether what stands at a path's end is what is wanted.
///
/// # Errors
/// What it is instead.
pub fn wanted(kind: Kind, component: &Component, standing: Standing) -> Result<(), Fault> {
    let is = |kinds: &[SFlag]| kinds.iter().any(|k| component.is(*k));
    let (fits, name) = match kind {
        Kind::File => (is(&[SFlag::S_IFREG]), "a file"),
        Kind::Program => {
            (is(&[SFlag::S_IFREG]) && component.mode & 0o111 != 0, "an executable file")
        }
        Kind::Directory | Kind::SharedDirectory => (is(&[SFlag::S_IFDIR]), "a directory"),
        Kind::Source => (is(&[SFlag::S_IFREG, SFlag::S_IFCHR]), "a file or a character device"),
        Kind::Socket => (is(&[SFlag::S_IFSOCK]), "a socket"),
        Kind::Any => (!is(&[SFlag::S_IFIFO]), "a file, a directory or a device"),
    };
    match (fits, kind, standing) {
        (false, ..) => Err(Fault::Kind { is: described(component), wanted: name }),
        (true, Kind::Directory, Standing::Sticky) => Err(Fault::Shared { mode: component.mode }),
        _ => Ok(()),
    }
}

/// Whether a file that is there may be written in its place.
///
/// # Errors
/// Why not.
pub fn writable(asker: Asker, component: &Component) -> Result<(), Fault> {
    replaceable(asker, component)?;
    acceptable(asker, component)?;
    match component.names {
        // 0: it has just been removed.
        0 | 1 => Ok(()),
        names => Err(Fault::Names(names)),
    }
}

/// Whether something else may take a file's place.
///
/// # Errors
/// Why not.
pub fn replaceable(asker: Asker, component: &Component) -> Result<(), Fault> {
    if component.is(SFlag::S_IFLNK) {
        return Err(Fault::Link);
    }
    wanted(Kind::File, component, Standing::Closed)?;
    ours(asker, component)
}

/// Whether a component is root's or that user's.
///
/// # Errors
/// Whose else.
pub fn ours(asker: Asker, component: &Component) -> Result<(), Fault> {
    match component.uid == 0 || component.uid == asker.uid {
        true => Ok(()),
        false => Err(Fault::Owner { uid: component.uid, mode: component.mode }),
    }
}

fn described(component: &Component) -> &'static str {
    let kinds = [
        (SFlag::S_IFREG, "a file that nobody may execute"),
        (SFlag::S_IFDIR, "a directory"),
        (SFlag::S_IFIFO, "a FIFO"),
        (SFlag::S_IFSOCK, "a socket"),
        (SFlag::S_IFCHR, "a character device"),
        (SFlag::S_IFBLK, "a block device"),
    ];
    match kinds.iter().find(|(kind, _)| component.is(*kind)) {
        Some((SFlag::S_IFREG, _)) if component.mode & 0o111 != 0 => "a file",
        Some((_, name)) => name,
        None => "something else",
    }
}

/// A path that is not only root's and this user's; which component, why, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Untrusted {
    path: PathBuf,
    fault: Fault,
    asker: Asker,
}

impl Untrusted {
    pub(super) fn new(path: PathBuf, fault: Fault, asker: Asker) -> Untrusted {
        Untrusted { path, fault, asker }
    }

    /// What to do about another user's component.
    fn of_ones_own(&self, mode: u32) -> String {
        let path = self.path.display();
        let link = SFlag::from_bits_truncate(mode) & SFlag::S_IFMT == SFlag::S_IFLNK;
        match (self.asker.uid, link) {
            (0, false) => format!("`chown root {path}`, or name another path"),
            (0, true) => format!("`chown -h root {path}`, or name another path"),
            (uid, _) => format!("it must be root's or uid {uid}'s, so name another path"),
        }
    }
}

impl fmt::Display for Untrusted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, who) = (self.path.display(), self.asker.name());
        let bits = |mode: &u32| mode & 0o7777;
        match &self.fault {
            Fault::Owner { uid, mode } => write!(
                f,
                "{path} is uid {uid}'s (mode {:04o}): whoever owns it decides what {who} runs: {}",
                bits(mode),
                self.of_ones_own(*mode)
            ),
            Fault::Others { mode } => write!(
                f,
                "{path} is writable for everybody (mode {:04o}): whoever writes there decides \
                 what {who} runs: `chmod o-w {path}`, or name another path",
                bits(mode)
            ),
            Fault::Group { gid, mode } => write!(
                f,
                "{path} is writable for group {gid} (mode {:04o}): whoever is in it decides what \
                 {who} runs: `chmod g-w {path}`, or name another path",
                bits(mode)
            ),
            Fault::List { mode } => write!(
                f,
                "{path} has an access control list that may let others write (mode {:04o}): who \
                 writes there decides what {who} runs: `setfacl -b {path}` and `chmod g-w {path}`, \
                 or name another path",
                bits(mode)
            ),
            Fault::Mount { uid } => write!(
                f,
                "{path} is a file system that uid {uid}'s program answers for: whoever runs it \
                 decides what {who} runs: name another path"
            ),
            Fault::Shared { mode } => write!(
                f,
                "{path} is writable for others (mode {:04o}), and a directory of {who}'s own is \
                 needed: name one below it",
                bits(mode)
            ),
            Fault::Missing => write!(
                f,
                "{path} is not there, and others may make entries in its directory: make it \
                 first, or name another path"
            ),
            Fault::Kind { is, wanted } => write!(f, "{path} is {is}, and {wanted} is needed"),
            Fault::Link => write!(
                f,
                "{path} is a symbolic link, and nothing is written through one: name where it \
                 leads, or remove it"
            ),
            Fault::Names(names) => write!(
                f,
                "{path} is a file with {names} names, and what is written would be in all of \
                 them: remove it"
            ),
            Fault::Deep(most) => write!(f, "{path} has more than {most} components"),
        }
    }
}

impl error::Error for Untrusted {}

impl From<Untrusted> for io::Error {
    fn from(e: Untrusted) -> io::Error {
        io::Error::other(e)
    }
}

/// Whether this is what an error is about.
pub fn refused(e: &io::Error) -> Option<&Untrusted> {
    e.get_ref()?.downcast_ref()
}
