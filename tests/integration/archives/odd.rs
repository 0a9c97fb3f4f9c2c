//! Archives that no program writes as it is meant to be used: GNU tar's word on each is ours,
//! or they are refused. `odd.py` beside the fixtures writes them.

use std::fs;
use std::path::Path;

use vmcache::tree::{compressed, unpack};

use super::{listed, program, same, Listed};
use crate::daemon::Dir;

/// Without the times of directories of which nothing is said: these are of now.
fn settled(mut all: Listed) -> Listed {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    for text in all.values_mut().filter(|text| text.starts_with('4')) {
        let Some((before, after)) = text.split_once(" at ") else { continue };
        let (time, rest) = after.split_once(' ').unwrap();
        let seconds: i64 = time.split('.').next().unwrap().parse().unwrap_or(0);
        if (0..3600).contains(&(now.as_secs() as i64 - seconds)) {
            *text = format!("{before} now {rest}");
        }
    }
    all
}

fn by_us(archive: &Path, to: &Path) -> Result<Listed, String> {
    let file = fs::File::open(archive).unwrap();
    let mut plain = compressed::plain(file).map_err(|e| e.to_string())?;
    let unpacked = unpack(&mut plain, to, true).map_err(|e| e.to_string())?;
    assert_eq!(unpacked.lost, None, "{archive:?}");
    Ok(settled(listed(to, true, true)))
}

fn by_gnu_tar(archive: &Path, to: &Path) -> Result<Listed, String> {
    let out = program("tar")
        .args(["--numeric-owner", "-p", "--xattrs", "--xattrs-include=*"])
        .args(["--delay-directory-restore", "-xf"])
        .arg(archive)
        .arg("-C")
        .arg(to)
        .output()
        .unwrap();
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into_owned());
    }
    Ok(settled(listed(to, true, true)))
}

#[test]
fn odd_archives_are_unpacked_as_by_gnu_tar_or_refused() {
    let dir = Dir::on_disk();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tar/odd.py");
    let out = program("python3").arg(&script).current_dir(&dir.0).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let (ours, theirs) = (dir.0.join("ours"), dir.0.join("theirs"));
    let (mut seen, mut wrong) = (0, Vec::new());
    for archive in fs::read_dir(&dir.0).unwrap().map(|e| e.unwrap().path()) {
        let name = archive.file_name().unwrap().to_str().unwrap().to_string();
        let Some((kind, _)) = name.split_once('-').filter(|_| name.ends_with(".tar")) else {
            continue;
        };
        seen += 1;
        for path in [&ours, &theirs] {
            let _ = fs::remove_dir_all(path);
            fs::create_dir(path).unwrap();
        }
        let result = std::panic::catch_unwind(|| {
            let (came, theirs) = (by_us(&archive, &ours), by_gnu_tar(&archive, &theirs));
            match kind {
                "same" | "noted" => same(&theirs.unwrap(), &came.unwrap(), &name),
                "refused" => {
                    assert!(theirs.is_err(), "GNU tar unpacks {name}");
                    assert!(came.as_ref().is_err_and(|e| e.len() > 20), "{name}: {came:?}");
                }
                // Through a link that is absolute: as for whoever has it as root.
                "rooted" => assert!(came.unwrap().contains_key(&b"usr/lib/in-root"[..])),
                other => panic!("{other}"),
            }
        });
        if result.is_err() {
            wrong.push(name);
        }
        assert!(!dir.0.join("outside").exists() && !Path::new("/outside").exists());
    }
    assert_eq!(wrong, [""; 0]);
    assert_eq!(seen, 25);
}
