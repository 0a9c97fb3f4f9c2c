//! Why something that a guest sent is not written on this host.

use std::fmt;

use super::MAX_DEPTH;

/// Why it is not.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The fields are what the text names.
pub enum Why {
    /// It is not what was asked for.
    Foreign { wanted: String },
    /// A device, a FIFO, a socket.
    Kind(&'static str),
    /// Its name is absolute, or has `..`.
    Leaves,
    /// Its name has no letters, or a NUL.
    Nameless,
    /// One of its names is too long.
    LongName { bytes: usize },
    /// It is nested too deep.
    Deep,
    /// A part of its name is something else than a directory.
    NoDirectory { part: String },
    /// It may not take the place that it is to have.
    NotThere(&'static str),
    /// A directory is there, which nothing replaces.
    OverDirectory,
    /// What it is a hard link to.
    Link { to: String, why: &'static str },
    /// Files are larger than allowed.
    TooLarge { allowed: u64 },
    /// There are more entries than allowed.
    TooMany { allowed: u64 },
    /// More directories than are remembered until the end.
    TooManyDirectories,
    /// The target's file system has too little left.
    Full { free: u64, total: u64, what: &'static str },
    /// It is no tar that is understood.
    Malformed(String),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Foreign { wanted } => {
                write!(f, "the guest was asked for {wanted:?} alone; refused")
            }
            Why::Kind(kind) => write!(
                f,
                "it is a {kind}: files, directories and links are copied out of a guest, and \
                 nothing else (devices and FIFOs with --archive, for guests that are trusted)"
            ),
            Why::Leaves => f.write_str("the name leaves the target; refused"),
            Why::Nameless => f.write_str("it has no name that can be; refused"),
            Why::LongName { bytes } => {
                write!(f, "a part of its name has {bytes} bytes, of at most 255; refused")
            }
            Why::Deep => {
                write!(f, "it is in more than {MAX_DEPTH} directories, one in another; refused")
            }
            Why::NoDirectory { part } => {
                write!(f, "{part:?} in its name is a link, or a file, and no directory; refused")
            }
            Why::NotThere(why) => f.write_str(why),
            Why::OverDirectory => f.write_str(
                "a directory of that name is there, and only a directory can be put in its \
                 place: remove it, or copy to another directory",
            ),
            Why::Link { to, why } => write!(f, "a hard link to {to:?}, {why}; refused"),
            Why::TooLarge { allowed } => write!(
                f,
                "with it, the files would have over {} ({allowed} bytes): allow more with \
                 --max-size",
                size(*allowed)
            ),
            Why::TooMany { allowed } => write!(
                f,
                "it is one of over {allowed} files, directories and links: copy fewer at a \
                 time, or allow more with --max-entries"
            ),
            Why::TooManyDirectories => f.write_str(
                "there are more directories than this keeps in mind: copy fewer at a time",
            ),
            Why::Full { free, total, what } => write!(
                f,
                "with it, less than 5 % of the {what} of the target's file system would be \
                 free ({free} of {total} are): make room, or copy to another one"
            ),
            Why::Malformed(why) => write!(f, "no tar stream that is understood: {why}"),
        }
    }
}

/// A number of bytes as people say it.
pub fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let step = (bytes.max(1).ilog2() / 10) as usize;
    match step {
        0 => format!("{bytes} bytes"),
        n => format!("{:.1} {}", bytes as f64 / (1u64 << (10 * n)) as f64, units[n.min(6)]),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_said_in_units() {
        assert_eq!(size(0), "0 bytes");
        assert_eq!(size(1023), "1023 bytes");
        assert_eq!(size(16 << 30), "16.0 GiB");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(u64::MAX), "16.0 EiB");
    }
}
