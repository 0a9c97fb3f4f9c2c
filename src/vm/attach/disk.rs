//! Disk images: a file or block device, raw or qcow2.
//!
//! Invariants: the format is what the user says or the name's ending, never what
//! the content looks like, for a guest writes that of a raw disk; an image that
//! would make QEMU open further files is refused.
//!
//! Source: QEMU's docs/interop/qcow2.rst.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::Error;

/// First bytes of a qcow2 image.
const QCOW2: [u8; 4] = *b"QFI\xfb";
/// Bytes of a qcow2 header that are looked at.
const HEADER: usize = 80;
/// Incompatible feature of qcow2: the data are in another file.
const EXTERNAL_DATA: u64 = 1 << 2;

/// What is in an image's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl Format {
    /// QEMU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

impl FromStr for Format {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Format, Self::Err> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err("must be raw or qcow2"),
        }
    }
}

/// A disk image that a VM shall have.
#[derive(Clone, Debug)]
pub struct Image {
    path: PathBuf,
    format: Option<Format>,
    read_only: bool,
}

impl Image {
    /// To be read and written; qcow2 when its name ends so, else raw.
    pub fn new(path: impl Into<PathBuf>) -> Image {
        Image { path: path.into(), format: None, read_only: false }
    }

    /// Only to be read; other VMs may then read it, too.
    pub fn read_only(mut self, read_only: bool) -> Image {
        self.read_only = read_only;
        self
    }

    /// Of this format, whatever its name or its first bytes.
    pub fn format(mut self, format: Option<Format>) -> Image {
        self.format = format;
        self
    }

    /// Opens it and looks whether it can be what it is said to be.
    ///
    /// # Errors
    /// [`Error::Open`] and [`Error::Image`].
    pub fn open(&self) -> Result<Disk, Error> {
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        let failed = |source| Error::Open { path: path.clone(), read_only: self.read_only, source };
        let bad = |what: &str| Error::Image { path: path.clone(), what: what.into() };
        // Not blocking: opening a FIFO would otherwise wait for its other end.
        let file = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
            .open(&path)
            .map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(bad(
                "neither a regular file nor a block device (for a directory or a tar \
                            file as root, use --rootfs)",
            ));
        }
        let mut header = [0; HEADER];
        let known = fill(&file, &mut header).map_err(failed)?;
        if known == 0 {
            return Err(bad("it is empty"));
        }
        let by_name = match path.extension() {
            Some(e) if e.eq_ignore_ascii_case("qcow2") => Format::Qcow2,
            _ => Format::Raw,
        };
        let format = self.format.unwrap_or(by_name);
        match (format, header.starts_with(&QCOW2)) {
            (Format::Qcow2, true) => self_contained(&header).map_err(|what| bad(&what))?,
            (Format::Qcow2, false) => {
                return Err(bad(
                    "not qcow2, which its name or --image-format says: if it is raw, \
                                use --image-format raw",
                ));
            }
            (Format::Raw, true) if self.format.is_none() => {
                return Err(bad("it begins like qcow2, but its name does not end in .qcow2: say \
                                which it is by --image-format qcow2 or raw"));
            }
            (Format::Raw, _) => {}
        }
        let block_device = kind.is_block_device();
        Ok(Disk { file, path, format, block_device, read_only: self.read_only })
    }
}

/// Reads from the file's beginning; how many bytes there were.
fn fill(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// Whether a qcow2 image stands alone.
fn self_contained(header: &[u8; HEADER]) -> Result<(), String> {
    let number =
        |at: usize| -> u64 { header[at..at + 8].iter().fold(0, |n, b| n << 8 | u64::from(*b)) };
    // Both are names in the image itself, which may come from anywhere.
    let other = if number(8) != 0 {
        "a backing file"
    } else if header[7] >= 3 && number(72) & EXTERNAL_DATA != 0 {
        "an external data file"
    } else {
        return Ok(());
    };
    Err(format!(
        "it names {other}, and vmcache opens no file because an image says so: make it one with \
         `qemu-img convert -O qcow2`"
    ))
}

/// An image that is open.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    format: Format,
    block_device: bool,
    read_only: bool,
}

impl Disk {
    /// Its file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its absolute path, when it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whether it is a block device of the host.
    pub fn block_device(&self) -> bool {
        self.block_device
    }

    /// Whether the VM may only read it.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u8, backing: u64, incompatible: u64) -> Vec<u8> {
        let mut h = [QCOW2.as_slice(), &[0, 0, 0, version], &backing.to_be_bytes()].concat();
        h.resize(72, 0);
        h.extend(incompatible.to_be_bytes());
        h
    }

    #[test]
    fn a_format_is_what_name_or_user_says_and_stands_alone() {
        let dir = std::env::temp_dir().join(format!("vmcache-disk-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let with = |name: &str, bytes: &[u8]| {
            std::fs::write(dir.join(name), bytes).unwrap();
            Image::new(dir.join(name))
        };
        let plain = header(3, 0, 0);
        let raw = with("a.img", &[0; 512]);
        assert_eq!(raw.open().unwrap().format(), Format::Raw);
        assert_eq!(with("a.qcow2", &plain).open().unwrap().format(), Format::Qcow2);
        // What a guest may write into its raw disk changes nothing when it is said to be raw.
        let written = with("b.img", &plain).format(Some(Format::Raw));
        assert_eq!(written.open().unwrap().format(), Format::Raw);
        for (image, words) in [
            (with("c.img", &plain), "begins like qcow2"),
            (with("d.qcow2", &[0; 512]), "not qcow2"),
            (with("e.img", &[]), "it is empty"),
            (with("f.qcow2", &header(2, 9, 0)), "names a backing file"),
            (with("g.qcow2", &header(3, 0, 4)), "names an external data file"),
            (with("h.qcow2", &QCOW2), "stands alone"),
            (Image::new(&dir).read_only(true), "neither a regular file"),
            (Image::new("/dev/null"), "neither a regular file"),
            (Image::new(dir.join("none")), "for reading and writing"),
        ] {
            match image.open() {
                Err(e) => assert!(e.to_string().contains(words), "{e}"),
                // A header cut short: QEMU's to refuse.
                Ok(d) => assert_eq!((words, d.format()), ("stands alone", Format::Qcow2)),
            }
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
