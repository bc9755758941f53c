-- EMIT and FINISH for all rows of a flush. Per row: the attempt is the one that runs, and seq == committed + 1.
-- ARGV: P R worker iso lease_ms, rows as MessagePack:
--   {id, epoch, nonce, seq, publish, event}, and where the job ends {…, final_state, result, rq_result, error_code, message}
-- Returns {row's number, status, reason} of each row that is not plainly 'OK'; status: 'OK' with the job's cancel
-- reason, 'DUP' (already written, word for word), 'FENCED' (another attempt's job, or another event stands there), 'GAP', each with that reason or ''; 'ERROR' with Redis's own error: that
-- row was not written, the others were.
local worker, iso, lease = ARGV[3], ARGV[4], tonumber(ARGV[5])
local now = now_ms()
local replies = {}
local OK = {'OK', ''}
local known = {}  -- control fields of jobs, as the rows so far left them: a flush often holds several rows of a job
local ends = {}  -- jobs that end in this flush: nothing of theirs is renewed
shared, shown = gather, gather_view
local ended = {}  -- RQ's counter of its worker → jobs of this flush

-- A resend is told from a zombie's row by the event itself: the script that ended a job that its
-- worker had lost wrote another one at that seq.
local function is_written(id, seq, payload)
  local entry = redis.call('XRANGE', k_events(id), int(seq) .. '-0', int(seq) .. '-0')[1]
  return entry ~= nil and table.concat(entry[2], '\0') == table.concat(entry_fields(payload), '\0')
end

-- `changes`: fields that the rows so far changed, written once a job and flush.
local function read(id)
  local v = redis.call('HMGET', k_job(id), 'st', 'ep', 'ow', 'no', 'seq', 'ca', 'q', 'ab', 'ls', 'sa', 'ft', 'ttl', 'tn')
  local c = {changes = {}, st = v[1], ep = v[2], ow = v[3], no = v[4], seq = v[5], ca = v[6], q = v[7], ab = v[8], ls = v[9],
             sa = v[10], ft = v[11], ttl = v[12], tn = v[13]}
  known[id] = c
  return c
end

-- Nobody has listened for abandon_after: the row should end.
local function note_listeners(c)
  local limit = tonumber(c.ab) or 0
  if limit == 0 then return end
  if c.receivers > 0 then c.changes.ls = int(now)
  elseif c.ca == '' and now - (tonumber(c.ls) or tonumber(c.sa) or now) > limit then
    c.ca, c.changes.ca = 'abandoned', 'abandoned'
  end
end

-- Once a flush: keep the lease, and see what stock tools did to the job.
local function renew(id, c)
  if c.renewed or ends[id] then return end
  c.renewed = true
  shared('ZADD', k_leases(c.q), int(now + lease), id)
  if c.ca == '' then
    c.ca = stock_verdict(id)
    if c.ca ~= '' then c.changes.ca = c.ca end
  end
end

local function commit(id, epoch, nonce, seq, publish, payload, state, result, rq_result, code, message)
  local c = known[id] or read(id)
  if not runs(c, worker, epoch, nonce) then
    -- The reply to the flush that ended the job was lost.
    local ended_here = TERMINAL[c.st] and c.ow == worker and is_attempt(c, epoch, nonce)
    if ended_here and is_written(id, seq, payload) then return {'DUP', ''} end
    return {'FENCED', ''}
  end
  local committed = tonumber(c.seq)
  if seq <= committed then
    if is_written(id, seq, payload) then return {'DUP', c.ca or ''} end
    return {'FENCED', ''}
  end
  if seq ~= committed + 1 then return {'GAP', c.ca or ''} end
  append_event(id, seq, payload)
  c.seq, c.changes.seq = seq, int(seq)
  if not c.ft and string.find(payload, '"token_ids"', 1, true) then c.ft, c.changes.ft = now, int(now) end
  -- Nobody can subscribe while the script runs: where the job's first event found no listener, no other will.
  if publish and c.receivers ~= 0 then c.receivers = redis.call('PUBLISH', k_channel(id), payload) end
  if state then
    known[id] = nil
    local kind = state == 'finished' and {1, rq_result, ''} or {2, '', rq_result}
    finalize(id, c.q, state, code, message, result, iso, now, worker, epoch, kind, c.changes, {c.ttl, c.tn})
    local counter = state == 'finished' and 'successful_job_count' or 'failed_job_count'
    ended[counter] = (ended[counter] or 0) + 1
    return OK
  end
  if publish then note_listeners(c) end
  renew(id, c)
  if not c.ca or c.ca == '' then return OK end
  return {'OK', c.ca}
end

-- What a job's own keys refuse now (a foreign stream under its id), they refuse every attempt: it ends here.
local function condemn(id, message)
  if not (string.find(message, 'WRONGTYPE', 1, true) or string.find(message, 'equal or smaller', 1, true)) then return end
  bury(id, redis.call('HGET', k_job(id), 'q') or '', iso, now)
end

-- What its rows so far left of a job, before anything else is done to it.
local function let_go(id)
  local c = known[id]
  known[id] = nil
  if c then set_fields(id, c.changes) end
end

local rows = cmsgpack.unpack(ARGV[6])
for _, row in ipairs(rows) do
  if row[7] then ends[row[1]] = true end
end
for i, row in ipairs(rows) do
  local ok, reply = pcall(commit, unpack(row))
  if not ok then
    pcall(let_go, row[1])
    reply = {'ERROR', type(reply) == 'table' and reply.err or tostring(reply)}
    pcall(condemn, row[1], reply[2])
  end
  if reply ~= OK then replies[#replies + 1] = {i, reply[1], reply[2]} end
end

for id, c in pairs(known) do set_fields(id, c.changes) end
write_gathered()

local function view_count()
  if not next(ended) or redis.call('EXISTS', k_rq_worker(worker)) == 0 then return end
  for counter, jobs in pairs(ended) do redis.call('HINCRBY', k_rq_worker(worker), counter, jobs) end
end
show(view_count)
return replies
