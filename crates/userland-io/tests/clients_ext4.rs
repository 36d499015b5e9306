//! A real file system: made by mke2fs from a tree of files, copied in, copied out, checked and compared.
#![cfg(all(feature = "nbd", unix))]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use userland_io::engines::Memory;

#[path = "common/clients.rs"]
mod clients;
#[path = "common/need.rs"]
mod need;
use clients::{Served, assert_same, image, succeed};

const SIZE: u64 = 64 << 20;

#[test]
fn an_ext4_image_comes_back_clean_with_every_file() {
    let programs = ["mke2fs", "e2fsck", "debugfs", "nbdcopy"].map(need::program);
    let [Some(mke2fs), Some(e2fsck), Some(debugfs), Some(nbdcopy)] = programs else {
        return;
    };
    for transport in 0..2 {
        let served = Served::disk(Memory::new(SIZE));
        let uri = &served.uris("disk")[transport];
        let paths = ["tree", "in.img", "out.img", "back"].map(|name| served.path(name));
        let [tree, source, target, back] = paths.each_ref().map(|path| path.to_str().unwrap());
        grow(Path::new(tree), 20 + transport as u64);

        fs::File::create(source).unwrap().set_len(SIZE).unwrap();
        succeed(&mke2fs, &["-q", "-t", "ext4", "-d", tree, source]);
        succeed(&nbdcopy, &["--connections=4", "--flush", source, uri]);
        succeed(&nbdcopy, &["--connections=4", uri, target]);
        assert_same(&fs::read(source).unwrap(), &fs::read(target).unwrap(), uri);

        succeed(&e2fsck, &["-f", "-n", target]);
        fs::create_dir(back).unwrap();
        succeed(&debugfs, &["-R", &format!("rdump / {back}"), target]);
        fs::remove_dir(Path::new(back).join("lost+found")).unwrap();
        let (grown, found) = (contents(Path::new(tree)), contents(Path::new(back)));
        assert_eq!(
            grown.keys().collect::<Vec<_>>(),
            found.keys().collect::<Vec<_>>()
        );
        assert!(grown == found, "a file differs");
    }
}

/// Makes directories and files: empty ones, small ones, large ones, sparse ones, and a link.
fn grow(tree: &Path, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    for dir in ["", "a", "a/b", "a/b/c", "empty", "many"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
    }
    for index in 0..200 {
        let bytes = image(random.usize(0..20_000), seed + index);
        fs::write(tree.join(format!("many/{index}")), bytes).unwrap();
    }
    for (name, len) in [
        ("nothing", 0),
        ("a/large", 9_000_000),
        ("a/b/c/deep", 123_457),
    ] {
        fs::write(tree.join(name), image(len, seed ^ len as u64)).unwrap();
    }
    fs::File::create(tree.join("sparse"))
        .unwrap()
        .set_len(5 << 20)
        .unwrap();
    std::os::unix::fs::symlink("a/large", tree.join("link")).unwrap();
}

/// Every path under `root`, with its bytes or where it points.
fn contents(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let kind = path.symlink_metadata().unwrap().file_type();
            let bytes = if kind.is_dir() {
                open.push(path.clone());
                Vec::new()
            } else if kind.is_symlink() {
                fs::read_link(&path)
                    .unwrap()
                    .into_os_string()
                    .into_encoded_bytes()
            } else {
                fs::read(&path).unwrap()
            };
            found.insert(path.strip_prefix(root).unwrap().to_owned(), bytes);
        }
    }
    found
}
