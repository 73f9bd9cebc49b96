//! Chunks that are spoiled, cut, forged, gone, or of another log: nobody is served them, and no other is hidden by them.

use super::*;

#[test]
fn damage_is_quarantined_and_a_reader_is_told() {
    run(async {
        let storage = Storage::open("memory:").unwrap();
        let log = open_in(&storage, Retention::default()).await;
        fill(&log, &[4, 3, 5]).await;
        let spoil = |name: String, at: usize| {
            let storage = storage.clone();
            async move {
                let mut object = storage.get(&name).await.unwrap().unwrap().to_vec();
                let at = if at == 0 { object.len() - 1 } else { at };
                object[at] ^= 1;
                storage.delete(&name).await.unwrap();
                storage.create(&name, object.into()).await.unwrap();
            }
        };
        drop(log);
        // A flipped pixel shows only when the chunk is read, a spoiled header at once.
        spoil(open::chunk_name(4), 0).await;
        let log = open_in(&storage, Retention::default()).await;
        assert_eq!(log.extent().lost_images, 0);
        assert!(matches!(log.load(4).await, Err(ReadError::Damaged)));
        assert_eq!(log.locate(5), Located::Lost { next_sequence: 7 });
        assert_eq!((log.extent().lost_images, log.extent().first_sequence), (3, 0));
        drop(log);
        spoil(open::chunk_name(7), 9).await;
        for _ in 0..2 {
            let log = open_in(&storage, Retention::default()).await;
            assert_eq!(log.locate(5), Located::Lost { next_sequence: log.extent().next_sequence });
            // The count of the spoiled newest is unknown: no sequence of it may be given again.
            assert!(log.extent().next_sequence >= 12, "{:?}", log.extent());
            assert_eq!(log.extent().first_sequence, 0);
            assert_eq!(images(&log.load(0).await.unwrap()), [0, 1, 2, 3]);
        }
        let names: Vec<String> =
            storage.list("log/quarantine/", None).await.unwrap().into_iter().map(|f| f.name).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(names[0].ends_with("00000000000000000004-3.safetensors"), "{names:?}");
    });
}

async fn replace(storage: &Storage, first: u64, object: Bytes) {
    storage.delete(&open::chunk_name(first)).await.unwrap();
    assert_eq!(storage.create(&open::chunk_name(first), object).await.unwrap(), Created::Yes);
}

#[test]
fn a_chunk_of_another_log_or_teacher_is_damage() {
    run(async {
        for other in [0, 1] {
            let storage = Storage::open("memory:").unwrap();
            let log = open_in(&storage, Retention::default()).await;
            fill(&log, &[4, 3, 5]).await;
            let ours = log.identity().clone();
            let theirs = match other {
                0 => LogIdentity { log_id: Uuid::from_u128(9), ..ours },
                _ => LogIdentity { teacher_sha256: "cd".repeat(32), ..ours },
            };
            let foreign =
                |first, count| Chunk::encode(&batch(first, count), first, &theirs).unwrap().payload().clone();
            let quarantined = async || storage.list("log/quarantine/", None).await.unwrap().len();
            // Under a daemon at work, which has it in its index.
            replace(&storage, 4, foreign(4, 3)).await;
            let reader = open_in(&storage, Retention::default()).await;
            assert_eq!((reader.locate(5), quarantined().await), (Located::Lost { next_sequence: 7 }, 1));
            replace(&storage, 4, foreign(4, 3)).await;
            log.cache.remove(4).await;
            assert!(matches!(log.load(4).await, Err(ReadError::Damaged)));
            assert_eq!(log.locate(5), Located::Lost { next_sequence: 7 });
            // Where the next chunk belongs: by whom it is found first.
            replace(&storage, 12, foreign(12, 2)).await;
            reader.refresh().await.unwrap();
            assert!(matches!(reader.locate(12), Located::Lost { .. }));
            replace(&storage, 12, foreign(12, 2)).await;
            let first = log.append(&Arc::new(batch(12, 2))).await.unwrap();
            assert!(first > 12, "{first}");
            assert_eq!(images(&log.load(first).await.unwrap()), [12, 13]);
            assert_eq!(log.locate(12), Located::Lost { next_sequence: first });
            assert!(quarantined().await >= 2);
            let log = open_in(&storage, Retention::default()).await;
            assert_eq!((log.extent().chunks, log.extent().next_sequence), (3, first + 2));
            // Where no chunk is the log's, the log's own file is what is wrong, and nothing is moved aside.
            for first in [0, 7, first] {
                replace(&storage, first, foreign(first, 4)).await;
            }
            let before = quarantined().await;
            let error = Log::open(storage.clone(), *log.options(), maker()).await.unwrap_err().to_string();
            assert!(error.contains("restore log/log.json"), "{error}");
            assert_eq!(quarantined().await, before);
            storage.delete("log/log.json").await.unwrap();
            let error = Log::open(storage.clone(), *log.options(), maker()).await.unwrap_err().to_string();
            assert!(error.contains("log/log.json is not there"), "{error}");
        }
    });
}

/// The chunk with an element of a column replaced, its checksum made right again.
fn forged(chunk: &Chunk, column: &str, element: &[u8]) -> Bytes {
    let payload = chunk.payload();
    let file = Checkpoint::parse(payload.clone()).unwrap();
    // The second row's.
    let at = file.get(column).unwrap().data.as_ptr() as usize - payload.as_ptr() as usize + element.len();
    let mut bytes = payload.to_vec();
    bytes[at..at + element.len()].copy_from_slice(element);
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let digest = hex(&Sha256::digest(&bytes[data..]));
    let old = chunk.summary.data_sha256.as_bytes();
    let at = bytes.windows(old.len()).position(|window| window == old).unwrap();
    bytes[at..at + old.len()].copy_from_slice(digest.as_bytes());
    bytes.into()
}

#[test]
fn an_impossible_image_makes_its_chunk_damaged() {
    run(async {
        let spoils: [(&str, &[u8]); 6] = [
            ("labels", &3i64.to_le_bytes()),
            ("labels", &(-1i64).to_le_bytes()),
            ("student_version", &(-1i64).to_le_bytes()),
            ("competition", &f32::INFINITY.to_le_bytes()),
            ("competition", &(-0.1f32).to_le_bytes()),
            ("competition", &0.7f32.to_le_bytes()),
        ];
        for (column, element) in spoils {
            let storage = Storage::open("memory:").unwrap();
            let log = open_in(&storage, Retention::default()).await;
            fill(&log, &[4, 3, 5]).await;
            for first in [4, 7] {
                let object = forged(&log.load(first).await.unwrap(), column, element);
                replace(&storage, first, object).await;
                log.cache.remove(first).await;
            }
            assert!(matches!(log.load(4).await, Err(ReadError::Damaged)), "{column}");
            // The newest one's length is known all the same.
            let log = open_in(&storage, Retention::default()).await;
            let Extent { next_sequence, lost_images, .. } = log.extent();
            assert_eq!((log.locate(5), next_sequence, lost_images), (Located::Lost { next_sequence: 12 }, 12, 8));
        }
    });
}

#[test]
fn a_cut_or_missing_chunk_keeps_its_sequences_and_hides_no_other() {
    run(async {
        for cut in [Some(0), Some(40), Some(890), None] {
            let storage = Storage::open("memory:").unwrap();
            fill(&*open_in(&storage, Retention::default()).await, &[4, 3, 5, 2]).await;
            let name = open::chunk_name(4);
            let object = storage.get(&name).await.unwrap().unwrap();
            storage.delete(&name).await.unwrap();
            if let Some(length) = cut {
                storage.create(&name, object.slice(..length)).await.unwrap();
            }
            for _ in 0..2 {
                let log = open_in(&storage, Retention::default()).await;
                assert_eq!(log.locate(5), Located::Lost { next_sequence: 7 }, "{cut:?}");
                let Extent { first_sequence, next_sequence, lost_images, .. } = log.extent();
                assert_eq!((first_sequence, next_sequence, lost_images), (0, 14, 3), "{cut:?}");
            }
        }
        // The newest: its header still tells how many it had.
        let storage = Storage::open("memory:").unwrap();
        fill(&*open_in(&storage, Retention::default()).await, &[4, 30]).await;
        let object = storage.get(&open::chunk_name(4)).await.unwrap().unwrap();
        storage.delete(&open::chunk_name(4)).await.unwrap();
        storage.create(&open::chunk_name(4), object.slice(..object.len() / 2)).await.unwrap();
        let log = open_in(&storage, Retention::default()).await;
        assert_eq!((log.extent().next_sequence, log.extent().lost_images), (34, 30));
    });
}
