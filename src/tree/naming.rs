//! What a copy is called where it arrives: docker cp's rules, for both directions.
//!
//! | there         | a file comes                | a directory comes             | `SRC/.` comes    |
//! |---------------|-----------------------------|-------------------------------|------------------|
//! | directory     | into it                     | into it                       | its contents     |
//! | file          | in its place                | refused                       | refused          |
//! | nothing       | by that name                | by that name                  | by that name     |
//! | nothing, `X/` | refused                     | by that name                  | by that name     |
//!
//! Invariants: nothing here looks at a file system, so that both sides decide by facts of
//! their own; a directory is never made for what is to be in it.
//!
//! Source: docker's reference, "docker container cp".

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// What is to be copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A file, link, or anything that is no directory.
    File,
    /// A directory.
    Directory,
    /// What is in a directory.
    Contents,
    /// A tar stream.
    Archive,
}

impl Source {
    /// All of them, with the names by which the host tells the guest.
    const NAMES: [(Source, &'static str); 4] = [
        (Source::File, "file"),
        (Source::Directory, "directory"),
        (Source::Contents, "contents"),
        (Source::Archive, "archive"),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        Source::NAMES.iter().find(|(s, _)| *s == self).map_or("", |(_, name)| name)
    }

    /// The one of that name.
    pub fn parse(name: &str) -> Option<Source> {
        Source::NAMES.iter().find(|(_, n)| *n == name).map(|(s, _)| *s)
    }
}

/// What is where it is to go, links followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum There {
    /// A directory.
    Directory,
    /// A file, or anything that is no directory.
    File,
    /// Nothing, in a directory that exists.
    Nothing,
}

/// Where a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Onto {
    /// Into the directory, by its own name.
    Inside,
    /// To that very name.
    As,
}

/// What may go there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Allowed {
    /// Anything.
    #[default]
    Any,
    /// Anything but a directory: a file is there.
    NotDirectory,
    /// A directory: the name ends with a slash, and nothing is there.
    Directory,
}

impl Allowed {
    /// Why something may not go there, if it may not.
    pub fn refusal(self, directory: bool) -> Option<&'static str> {
        match (self, directory) {
            (Allowed::NotDirectory, true) => Some(
                "a directory cannot be copied onto what is no directory (os error 20): name a \
                 directory, or a name that is not there yet",
            ),
            (Allowed::Directory, false) => Some(
                "no such directory (os error 2): a name that ends with a slash must be a directory's; make it \
                 first, or leave the slash out",
            ),
            _ => None,
        }
    }
}

/// What a name ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Its last part.
    Plain,
    /// A slash: it is a directory's, a link's is followed.
    Slash,
    /// `/.`, or it is `.`: what is in the directory.
    Dot,
}

impl Ending {
    /// A name's.
    pub fn of(name: &OsStr) -> Ending {
        match name.as_bytes() {
            b"." => Ending::Dot,
            [.., b'/', b'.'] => Ending::Dot,
            [.., b'/'] => Ending::Slash,
            _ => Ending::Plain,
        }
    }

    /// Whether it says that a directory is meant.
    pub fn is_directory(self) -> bool {
        self != Ending::Plain
    }
}

/// A name without slashes and `/.` at its end; `/` and `.` stay.
pub fn without_ending(name: &OsStr) -> &OsStr {
    let mut rest = name.as_bytes();
    loop {
        rest = match rest {
            [b'/', b'.'] => b"/",
            [start @ .., b'/', b'.'] => start,
            [start @ .., b'/'] if !start.is_empty() => start,
            _ => return OsStr::from_bytes(rest),
        };
    }
}

/// A path of a guest as docker cp reads it: from the root, with or without a slash before it,
/// `..` taken back by its letters and never above the root. Its ending stays.
pub fn from_root(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    let ending = match Ending::of(OsStr::new(path)) {
        _ if parts.is_empty() => "",
        Ending::Plain => "",
        Ending::Slash => "/",
        Ending::Dot => "/.",
    };
    format!("/{}{ending}", parts.join("/"))
}

/// Where something goes, and what may.
///
/// # Errors
/// Why nothing may.
pub fn decide(there: There, ending: Ending) -> Result<(Onto, Allowed), &'static str> {
    match (there, ending.is_directory()) {
        (There::Directory, _) => Ok((Onto::Inside, Allowed::Any)),
        (There::File, true) => Err("Not a directory (os error 20), and its name ends with a slash"),
        (There::File, false) => Ok((Onto::As, Allowed::NotDirectory)),
        (There::Nothing, true) => Ok((Onto::As, Allowed::Directory)),
        (There::Nothing, false) => Ok((Onto::As, Allowed::Any)),
    }
}

/// A directory and a name in it.
pub fn split(path: &Path) -> Option<(PathBuf, OsString)> {
    let base = path.file_name()?.to_os_string();
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Some((parent.to_path_buf(), base))
}

/// A name of any bytes in hexadecimal digits, for arguments and lines.
pub fn to_hex(name: &OsStr) -> String {
    name.as_bytes().iter().map(|b| format!("{b:02x}")).collect()
}

/// The name that [`to_hex`] wrote, if it is one that a file can have.
pub fn from_hex(digits: &str) -> Option<OsString> {
    let digits = digits.as_bytes();
    let value = |d: u8| char::from(d).to_digit(16);
    let pairs = digits.chunks(2).map(|pair| match pair {
        [high, low] => u8::try_from(value(*high)? * 16 + value(*low)?).ok(),
        _ => None,
    });
    let bytes: Vec<u8> = pairs.collect::<Option<_>>()?;
    let good = !bytes.is_empty() && bytes.len() <= 255 && !bytes.contains(&0);
    let good = good && !bytes.contains(&b'/') && bytes != b"." && bytes != b"..";
    good.then(|| OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table above, cell by cell.
    #[test]
    fn the_rules_are_docker_cps() {
        use Onto::{As, Inside};
        let cell = |there, ending, directory| {
            let (onto, allowed) = decide(there, ending).ok()?;
            allowed.refusal(directory).is_none().then_some(onto)
        };
        for (there, name, file, directory) in [
            (There::Directory, "d", Some(Inside), Some(Inside)),
            (There::Directory, "d/", Some(Inside), Some(Inside)),
            (There::Directory, "d/.", Some(Inside), Some(Inside)),
            (There::File, "f", Some(As), None),
            (There::File, "f/", None, None),
            (There::Nothing, "n", Some(As), Some(As)),
            (There::Nothing, "n/", None, Some(As)),
            (There::Nothing, "n/.", None, Some(As)),
        ] {
            let ending = Ending::of(OsStr::new(name));
            assert_eq!(cell(there, ending, false), file, "a file to {name}");
            assert_eq!(cell(there, ending, true), directory, "a directory to {name}");
        }
    }

    #[test]
    fn endings_are_told_apart_and_taken_off() {
        for (name, ending, rest) in [
            ("a/b", Ending::Plain, "a/b"),
            ("a/b/", Ending::Slash, "a/b"),
            ("a/b//", Ending::Slash, "a/b"),
            ("a/b/.", Ending::Dot, "a/b"),
            ("a/./", Ending::Slash, "a"),
            (".", Ending::Dot, "."),
            ("..", Ending::Plain, ".."),
            ("/", Ending::Slash, "/"),
            ("/.", Ending::Dot, "/"),
            ("a.", Ending::Plain, "a."),
            (".a/..", Ending::Plain, ".a/.."),
        ] {
            assert_eq!(Ending::of(OsStr::new(name)), ending, "{name}");
            assert_eq!(without_ending(OsStr::new(name)), rest, "{name}");
        }
    }

    #[test]
    fn paths_of_a_guest_begin_at_its_root() {
        for (path, want) in [
            ("", "/"),
            ("/", "/"),
            (".", "/"),
            ("etc", "/etc"),
            ("/etc/", "/etc/"),
            ("etc/.", "/etc/."),
            ("/a/../b", "/b"),
            ("/../../b", "/b"),
            ("a/b/..", "/a"),
            ("//a//b/./c", "/a/b/c"),
            ("/..", "/"),
        ] {
            assert_eq!(from_root(path), want, "{path}");
        }
    }

    #[test]
    fn names_of_any_bytes_are_carried_by_digits() {
        let name = OsStr::from_bytes(b"a b\xff\n");
        assert_eq!(from_hex(&to_hex(name)).as_deref(), Some(name));
        for bad in ["", "6", "6g", "2f", "00", "2e", "2e2e", &"61".repeat(256)] {
            assert_eq!(from_hex(bad), None, "{bad}");
        }
    }
}
