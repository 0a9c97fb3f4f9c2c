//! Which kernel modules a guest needs, in the order in which they load.
//!
//! Dependencies come from `modules.dep`, or, where a package ships none (as
//! Debian's, which makes it at installation), from each module's own
//! `.modinfo`. A name that is neither a module nor built in is an error only
//! for the modules that a guest can not do without.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

use super::Error;

/// Largest module read, unpacked, in bytes.
const MAX_MODULE: u64 = 64 * 1024 * 1024;

/// Modules that a guest can not do without: its bus and its serial ports.
pub const NEEDED: [&str; 2] = ["virtio_pci", "virtio_console"];
/// Modules that are packed where the kernel has them.
pub const WANTED: [&str; 13] = [
    "virtio_rng",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
    "virtio_net",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "overlay",
    "virtiofs",
    "9p",
    "9pnet_virtio",
    // ext4 asks for it by name when it mounts, which no list of dependencies says.
    "crc32c_generic",
    "ext4",
];
/// Order of the first ones: the transport's legacy half must be there before
/// virtio_pci looks for it, and nothing declares that.
const FIRST: [&str; 5] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"];

/// A module that is packed.
#[derive(Debug)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The file's contents, unpacked.
    pub data: Vec<u8>,
}

/// One kernel's modules, `/lib/modules/VERSION` or the like.
pub struct Modules {
    dir: PathBuf,
    files: HashMap<String, PathBuf>,
    built_in: HashSet<String>,
    listed: HashMap<String, Vec<String>>,
}

/// Module name of a file: `a-b.ko.xz` is `a_b`.
fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file.split_once(".ko")?.0;
    Some(stem.replace('-', "_"))
}

impl Modules {
    /// Looks through a directory of modules.
    ///
    /// # Errors
    /// When it can not be read or has no module.
    pub fn open(dir: &Path) -> Result<Modules, Error> {
        let mut files = HashMap::new();
        let mut todo = vec![dir.to_path_buf()];
        while let Some(next) = todo.pop() {
            let entries =
                fs::read_dir(&next).map_err(|source| Error::Read { path: next.clone(), source })?;
            for entry in entries.flatten() {
                let path = entry.path();
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    todo.push(path);
                } else if let Some(name) = name_of(&path) {
                    files.insert(name, path);
                }
            }
        }
        if files.is_empty() {
            return Err(Error::NoModules { dir: dir.to_path_buf() });
        }
        let text = |f: &str| fs::read_to_string(dir.join(f)).unwrap_or_default();
        let built_in =
            text("modules.builtin").lines().filter_map(|l| name_of(Path::new(l))).collect();
        let mut listed = HashMap::new();
        for (file, needs) in text("modules.dep").lines().filter_map(|l| l.split_once(':')) {
            if let Some(name) = name_of(Path::new(file)) {
                let needs = needs.split_whitespace().filter_map(|n| name_of(Path::new(n)));
                listed.insert(name, needs.collect());
            }
        }
        Ok(Modules { dir: dir.to_path_buf(), files, built_in, listed })
    }

    /// The modules to pack, dependencies before what needs them.
    ///
    /// # Errors
    /// A needed module is missing, or a file can not be read or unpacked.
    pub fn select(&self, extra: &[String]) -> Result<Vec<Module>, Error> {
        let mut out = Vec::new();
        let mut done = HashSet::new();
        for name in FIRST {
            if self.files.contains_key(name) {
                self.add(name, &mut done, &mut out)?;
            }
        }
        let extra: Vec<String> = extra.iter().map(|e| e.replace('-', "_")).collect();
        for name in NEEDED.into_iter().chain(extra.iter().map(String::as_str)) {
            if !self.files.contains_key(name) && !self.built_in.contains(name) {
                return Err(Error::MissingModule { name: name.into(), dir: self.dir.clone() });
            }
            self.add(name, &mut done, &mut out)?;
        }
        for name in WANTED {
            self.add(name, &mut done, &mut out)?;
        }
        Ok(out)
    }

    fn add(
        &self,
        name: &str,
        done: &mut HashSet<String>,
        out: &mut Vec<Module>,
    ) -> Result<(), Error> {
        let Some(path) = self.files.get(name) else { return Ok(()) };
        if !done.insert(name.to_string()) {
            return Ok(());
        }
        let data = unpack(path)?;
        let needs = match self.listed.get(name) {
            Some(list) => list.clone(),
            None => depends(path, &data)?,
        };
        for need in needs {
            self.add(&need, done, out)?;
        }
        out.push(Module { name: name.to_string(), data });
        Ok(())
    }
}

/// A module's bytes, unpacked by the ending of its name.
fn unpack(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read { path: path.to_path_buf(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let ending = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let mut data = Vec::new();
    match ending {
        "ko" => file.take(MAX_MODULE).read_to_end(&mut data),
        "gz" => flate2::read::GzDecoder::new(file).take(MAX_MODULE).read_to_end(&mut data),
        "xz" => lzma_rust2::XzReader::new(file, true).take(MAX_MODULE).read_to_end(&mut data),
        "zst" => ruzstd::decoding::StreamingDecoder::new(file)
            .map_err(std::io::Error::other)
            .and_then(|d| d.take(MAX_MODULE).read_to_end(&mut data)),
        other => Err(std::io::Error::other(format!("compression {other:?} is not known"))),
    }
    .map_err(failed)?;
    Ok(data)
}

/// What a module's own `.modinfo` says it depends on.
fn depends(path: &Path, data: &[u8]) -> Result<Vec<String>, Error> {
    let bad = |e: object::Error| Error::NotAModule { path: path.to_path_buf(), why: e.to_string() };
    let elf = object::File::parse(data).map_err(bad)?;
    let Some(section) = elf.section_by_name(".modinfo") else { return Ok(Vec::new()) };
    let info = section.data().map_err(bad)?;
    let list = info
        .split(|b| *b == 0)
        .find_map(|line| line.strip_prefix(b"depends="))
        .map(String::from_utf8_lossy)
        .unwrap_or_default();
    Ok(list.split(',').filter(|n| !n.is_empty()).map(|n| n.replace('-', "_")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn compressed_modules_are_unpacked() {
        let dir = std::env::temp_dir().join(format!("vmcache-modules-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("virtio-x.ko.gz");
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(b"not an ELF file").unwrap();
        fs::write(&path, gz.finish().unwrap()).unwrap();
        assert_eq!(unpack(&path).unwrap(), b"not an ELF file");
        let error = depends(&path, b"not an ELF file").unwrap_err().to_string();
        assert!(error.contains("virtio-x.ko.gz"), "{error}");
        assert_eq!(name_of(&path).unwrap(), "virtio_x");
        let missing = Modules::open(&dir).unwrap().select(&[]).unwrap_err().to_string();
        assert!(missing.contains("virtio_pci"), "{missing}");
        fs::remove_dir_all(&dir).unwrap();
    }
}
