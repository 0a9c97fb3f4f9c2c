//! CopyFile: files, directories and links from the host, in pieces.
//!
//! A file comes in pieces by offset into a temporary name beside it and takes
//! its place with the last one, so nobody sees half a file. The guest takes its
//! name from the file that hostname(5) tells of, as at a boot.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{chown, lchown, symlink, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::SFlag;
use nix::unistd::sethostname;

use super::failure::{Attempt, Failure, Outcome};
use crate::proto::agent::CopyFileRequest;

/// What the guest is called.
const HOST_NAME: &str = "/etc/hostname";

/// Stores what one request brings.
pub fn store(r: &CopyFileRequest) -> Outcome<()> {
    let path = PathBuf::from(&r.path);
    let attempt = || format!("copy to {}", path.display());
    let plain = path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || path.file_name().is_none() {
        return Err(Failure::invalid(format!("copy to {:?}: not a plain absolute path", r.path)));
    }
    if let Some(parent) = path.parent() {
        if !parent.exists() {
            fs::create_dir_all(parent).during(attempt)?;
            let mode = if r.dir_mode == 0 { 0o755 } else { r.dir_mode & 0o7777 };
            fs::set_permissions(parent, fs::Permissions::from_mode(mode)).during(attempt)?;
        }
    }
    let (uid, gid) = (u32::try_from(r.uid).ok(), u32::try_from(r.gid).ok());
    let kind = SFlag::from_bits_truncate(r.file_mode) & SFlag::S_IFMT;
    let mode = fs::Permissions::from_mode(r.file_mode & 0o7777);
    if kind == SFlag::S_IFDIR {
        match fs::create_dir(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
            other => other.during(attempt)?,
        }
        chown(&path, uid, gid).during(attempt)?;
        return fs::set_permissions(&path, mode).during(attempt);
    }
    if kind == SFlag::S_IFLNK {
        let target = std::str::from_utf8(&r.data)
            .map_err(|_| Failure::invalid(format!("copy to {}: link to no text", r.path)))?;
        let _ = fs::remove_file(&path);
        symlink(target, &path).during(attempt)?;
        return lchown(&path, uid, gid).during(attempt);
    }
    piece(r, &path).and_then(|whole| {
        let Some(temporary) = whole else { return Ok(()) };
        chown(&temporary, uid, gid).during(attempt)?;
        fs::set_permissions(&temporary, mode).during(attempt)?;
        fs::rename(&temporary, &path).during(attempt)?;
        if path == Path::new(HOST_NAME) {
            // A file that is no name is only a file.
            let name = fs::read_to_string(&path).unwrap_or_default();
            if let Err(e) = sethostname(name.trim()) {
                eprintln!("vmcache-agent: set the host name as {HOST_NAME} says: {e}");
            }
        }
        Ok(())
    })
}

/// Writes a piece; the temporary file's path when it was the last.
fn piece(r: &CopyFileRequest, path: &Path) -> Outcome<Option<PathBuf>> {
    let attempt = || format!("copy to {}", path.display());
    let offset = u64::try_from(r.offset).ok();
    let size = u64::try_from(r.file_size).ok();
    let end = offset.and_then(|o| o.checked_add(r.data.len() as u64));
    let (Some(offset), Some(size), Some(end)) = (offset, size, end) else {
        return Err(Failure::invalid(format!("{}: negative size or offset", attempt())));
    };
    if end > size {
        return Err(Failure::invalid(format!("{}: {end} bytes of a file of {size}", attempt())));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.vmcache-part"));
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(offset == 0)
        .mode(0o600)
        .open(&temporary)
        .during(attempt)?;
    file.write_all_at(&r.data, offset).during(attempt)?;
    Ok((end == size).then_some(temporary))
}
