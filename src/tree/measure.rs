//! What a tree takes up in a guest's memory, told before it is sent.
//!
//! Invariants: nothing is opened but directories, no link is followed; what cannot be looked
//! at counts nothing: it is who reads it that tells.
//!
//! Does not: promise anything. Others write to both sides meanwhile, so a file system may be
//! full all the same.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::MAX_DEPTH;

/// Bytes of a page: what a file system in memory gives a file at once.
const PAGE: u64 = 4096;

/// Room in a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Bytes of files, each rounded up to whole pages, holes left out.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
}

impl Needs {
    /// Adds one with so many bytes.
    pub fn add(&mut self, bytes: u64) {
        let pages = bytes.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        self.bytes = self.bytes.saturating_add(pages);
        self.inodes = self.inodes.saturating_add(1);
    }

    /// As the guest is told it.
    pub fn text(&self) -> String {
        format!("{} {}", self.bytes, self.inodes)
    }

    /// What [`Needs::text`] wrote.
    pub fn parse(text: &str) -> Option<Needs> {
        let (bytes, inodes) = text.split_once(' ')?;
        Some(Needs { bytes: bytes.parse().ok()?, inodes: inodes.parse().ok()? })
    }
}

/// Looks at a file, or a directory and all that is in it, other file systems too, as `pack`
/// does; `top` says whether `source` itself counts.
pub fn measure(source: &Path, top: bool) -> Needs {
    let mut needs = Needs::default();
    let mut seen = HashSet::new();
    let Ok(meta) = (if top { source.symlink_metadata() } else { source.metadata() }) else {
        return needs;
    };
    let mut left: Vec<(PathBuf, usize)> = Vec::new();
    let mut count = |path: &Path, meta: &fs::Metadata, depth: usize, top: bool| {
        let file = meta.is_file();
        if file && meta.nlink() > 1 && !seen.insert((meta.dev(), meta.ino())) {
            return None;
        }
        if top {
            let held = meta.blocks().saturating_mul(512);
            needs.add(if file { meta.len().min(held.max(1)) } else { 0 });
        }
        let enter = meta.is_dir() && depth < MAX_DEPTH;
        enter.then(|| (path.to_path_buf(), depth + 1))
    };
    left.extend(count(source, &meta, 0, top));
    while let Some((directory, depth)) = left.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if let Ok(meta) = path.symlink_metadata() {
                left.extend(count(&path, &meta, depth, true));
            }
        }
    }
    needs
}

#[cfg(feature = "host")]
pub use stream::measure_tar;

#[cfg(feature = "host")]
mod stream {
    use std::io::Read;

    use super::super::reader::{Kind, Reader};
    use super::super::Error;
    use super::Needs;

    /// Directories of which a root file system has one.
    const SYSTEM: [&[u8]; 4] = [b"bin", b"usr", b"etc", b"sbin"];

    /// The same of a tar stream, which is read to its end; and whether it is one that
    /// `docker save` wrote, whose files are layers.
    ///
    /// # Errors
    /// When it is none that is understood: then nobody knows.
    pub fn measure_tar(stream: &mut dyn Read) -> Result<(Needs, bool), Error> {
        let (mut needs, mut reader) = (Needs::default(), Reader::trusting(stream));
        let (mut manifest, mut system) = (false, false);
        while let Some(entry) = reader.next()? {
            let name = entry.name.strip_prefix(b"./").unwrap_or(&entry.name);
            let first = name.split(|b| *b == b'/').find(|part| !part.is_empty());
            manifest |= matches!(name, b"manifest.json" | b"oci-layout");
            system |= first.is_some_and(|first| SYSTEM.contains(&first));
            if entry.kind != Kind::Link {
                let stored = entry.pieces.iter().fold(0u64, |n, p| n.saturating_add(p.length));
                needs.add(if entry.kind == Kind::File { stored } else { 0 });
            }
        }
        Ok((needs, manifest && !system))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_and_its_tar_need_the_same() {
        let dir = std::env::temp_dir().join(format!("vmcache-measure-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/one"), vec![b'x'; 5000]).unwrap();
        fs::hard_link(dir.join("sub/one"), dir.join("twin")).unwrap();
        fs::write(dir.join("empty"), b"").unwrap();
        std::os::unix::fs::symlink("/etc", dir.join("link")).unwrap();
        let holes = fs::File::create(dir.join("holes")).unwrap();
        holes.set_len(1 << 30).unwrap();
        // one, empty, link, holes, sub
        let needs = measure(&dir, false);
        assert_eq!(needs.inodes, 5);
        assert!((8192..16 << 10).contains(&needs.bytes), "{needs:?}");
        assert_eq!(measure(&dir, true).inodes, 6);
        assert_eq!(measure(&dir.join("nothing"), true), Needs::default());
        assert_eq!(Needs::parse(&needs.text()), Some(needs));
        assert_eq!(Needs::parse("1"), None);

        let mut bytes = Vec::new();
        super::super::pack(&dir, Path::new(""), super::super::Sockets::Skip, &mut bytes).unwrap();
        let told = measure_tar(&mut bytes.as_slice()).unwrap();
        assert_eq!(told.0.inodes, 5);
        assert!((8192..16 << 10).contains(&told.0.bytes), "{told:?}");
        fs::remove_dir_all(&dir).unwrap();
    }
}
