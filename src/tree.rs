//! Directory trees as tar streams, both ways.
//!
//! | module      | does |
//! |-------------|------|
//! | [`pack`]    | a tree becomes a stream: on the host for a guest, in the guest for its host |
//! | [`unpack`]  | a stream becomes a tree, with all that a root file system has: in the guest, which trusts its host |
//! | `extract`   | a stream becomes a tree on the host, which does not trust the guest |
//! | `reader`    | tar's formats: headers, PAX records (`pax`), holes (`sparse`) |
//! | `inode`     | owners, modes, times, extended attributes of what was made |
//! | `compressed` | archives compressed by gzip, xz (`xz_window`), zstd |
//! | `measure`   | how much room a tree or a tar takes |
//! | `target`    | where `extract` writes: a directory that nothing leads out of |
//! | [`naming`]  | what a copy is called where it arrives |
//! | [`measure`](measure::measure) | what a tree takes up, before it is sent |
//! | `forward`   | a guest's stream becomes a tar of the host's own making, for `cp ID:PATH -` |
//! | `walk`      | directories and files opened one name after the other, for `pack` |
//!
//! Invariants: [`pack`] never follows a symbolic link, and never waits for what is no
//! file; [`unpack`] and `extract` never write outside their target, and keep no more of a
//! stream in memory than their named bounds.

use std::error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

mod holes;
mod inode;
pub mod measure;
pub mod naming;
mod pack;
mod pax;
mod reader;
pub(crate) mod refusal;
mod sparse;
mod unpack;
pub(crate) mod walk;

#[cfg(feature = "host")]
mod budget;
#[cfg(feature = "host")]
pub mod compressed;
#[cfg(feature = "host")]
pub mod extract;
#[cfg(feature = "host")]
mod forward;
#[cfg(feature = "host")]
mod stop;
#[cfg(feature = "host")]
mod target;
#[cfg(feature = "host")]
mod xz_window;

pub use pack::{pack, pack_root, Packed, Sockets};
pub use refusal::Why;
pub use unpack::{unpack, unpack_into, Unpacked};

#[cfg(feature = "host")]
pub use extract::{extract, Extracted, Policy};
#[cfg(feature = "host")]
pub use forward::{finish, forward};
#[cfg(feature = "host")]
pub use stop::Stop;

/// Environment variable of the guest's `pack`: sockets are left out, and no error.
pub const SKIP_SOCKETS: &str = "VMCACHE_SKIP_SOCKETS";
/// Environment variable of the guest's `pack`: the root in which its path's links lead.
pub const ROOT: &str = "VMCACHE_ROOT";
/// Environment variable of the guest's `pack`: a link that is named is followed.
pub const FOLLOW: &str = "VMCACHE_FOLLOW";
/// Environment variable of the guest's `unpack` and `put`: what comes needs so much
/// ([`measure::Needs::text`]), and what is known of the file system is told on stdout.
pub const NEEDS: &str = "VMCACHE_NEEDS";

/// Most bytes of one entry's names and extended attributes.
pub const MAX_NAMES: u64 = 1024 * 1024;
/// Most directories inside one another: each has an open file while it is walked.
pub const MAX_DEPTH: usize = 256;

/// Why a tree could not be packed, unpacked or extracted.
#[derive(Debug)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Error {
    /// The system refused.
    Io { during: &'static str, path: PathBuf, source: io::Error },
    /// The stream is no tar, or breaks off.
    Stream { source: io::Error },
    /// A name leads out of the target.
    Escape { name: PathBuf },
    /// A file became shorter while it was read.
    Shrunk { path: PathBuf, size: u64, read: u64 },
    /// A tree is nested too deep to be walked.
    Deep { path: PathBuf },
    /// A socket, which no tar has.
    Socket { path: PathBuf },
    /// What came is not written: it is not understood, or comes out of a guest and is not
    /// what a guest may send.
    Refused { name: PathBuf, why: Why },
    /// Somebody asked for the end ([`Stop`]).
    #[cfg(feature = "host")]
    Stopped,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Whole in one line: in the guest, this is all that is printed.
            Error::Io { during, path, source } => {
                write!(f, "{during} {}: {}", path.display(), causes(source))
            }
            Error::Stream { source } => write!(f, "read the tar stream: {}", causes(source)),
            Error::Escape { name } => {
                write!(f, "unpack {}: the name leaves the target; refused", name.display())
            }
            Error::Shrunk { path, size, read } => write!(
                f,
                "pack {}: it ended after {read} of {size} bytes: it became shorter while it \
                 was copied",
                path.display()
            ),
            Error::Deep { path } => write!(
                f,
                "pack {}: it is in more than {MAX_DEPTH} directories, one in another",
                path.display()
            ),
            Error::Socket { path } => {
                write!(f, "pack {}: it is a socket, which cannot be copied", path.display())
            }
            Error::Refused { name, why } if name.as_os_str().is_empty() => why.fmt(f),
            Error::Refused { name, why } => write!(f, "{}: {why}", name.display()),
            #[cfg(feature = "host")]
            Error::Stopped => f.write_str("interrupted"),
        }
    }
}

impl error::Error for Error {}

impl Error {
    /// The system's number for it, if it was the system that refused.
    pub fn errno(&self) -> Option<i32> {
        let (Error::Io { source, .. } | Error::Stream { source }) = self else { return None };
        let mut next: Option<&(dyn error::Error + 'static)> = Some(source);
        while let Some(e) = next {
            let io = e.downcast_ref::<io::Error>();
            if let Some(number) = io.and_then(io::Error::raw_os_error) {
                return Some(number);
            }
            // An error inside an `io::Error` is not among its sources, but its own are.
            let inner = io.and_then(io::Error::get_ref);
            next = inner.map(|e| e as &(dyn error::Error + 'static)).or_else(|| e.source());
        }
        None
    }
}

/// An error with all that caused it: some name a file, and keep the reason to themselves.
fn causes(e: &io::Error) -> String {
    let mut out = e.to_string();
    let mut next = error::Error::source(e);
    while let Some(cause) = next {
        let text = cause.to_string();
        if !out.ends_with(&text) {
            out = format!("{out}: {text}");
        }
        next = cause.source();
    }
    out
}

fn io_at<'a>(during: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io { during, path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests;
