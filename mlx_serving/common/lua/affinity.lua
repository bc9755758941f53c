-- Which workers likely have the beginning of a job's prompt computed: those that took a job with one of its marks lately.
-- Follows the prelude, before claim.lua. A job's marks are "<conversation>,<beginning>", either may be empty. Nothing here
-- decides more than who goes first: if something is lost or odd under these keys, a job is delayed by the bound at most.

local note_holder, better_place, is_elsewhere  -- what claim.lua calls; the rest is of this block (Lua has room for 200 locals)

do
  local HOLDERS, MARK_MS = 8, 600000  -- names kept of a mark, the last one first; how long
  local SPREAD = 4  -- a beginning is computed anew if those that have it hold this part of their rows more than others
  local NAME = '[^\n]+'

  local holders, noted, peers = {}, {}, {}  -- what this claim has read: by mark, by mark, by worker

  -- 16 hex digits each; what has another length is none.
  local function marks_of(job)
    local marks = job.marks
    if #marks == 33 then return string.sub(marks, 1, 16), string.sub(marks, 18) end
    if #marks == 17 then
      if string.sub(marks, 1, 1) == ',' then return '', string.sub(marks, 2) end
      return string.sub(marks, 1, 16), ''
    end
    return '', ''
  end

  -- A line each, with one before the first and one after the last.
  local function holders_of(mark)
    if not holders[mark] then
      local names = redis.pcall('GET', k_warm(mark))
      holders[mark] = type(names) == 'string' and names or ''
    end
    return holders[mark]
  end

  local function holds(mark, worker) return string.find(holders_of(mark), '\n' .. worker .. '\n', 1, true) ~= nil end

  local function set_holders(mark, names)
    holders[mark] = names
    redis.pcall('SET', k_warm(mark), names, 'PX', MARK_MS)
  end

  local function note_beginning(mark, worker)
    local names, count = {'', worker}, 1
    for name in string.gmatch(holders_of(mark), NAME) do
      if name ~= worker and count < HOLDERS then
        names[#names + 1], count = name, count + 1
      end
    end
    names[#names + 1], noted[mark] = '', true
    set_holders(mark, table.concat(names, '\n'))
  end

  -- A conversation is at the worker that took its last turn; a beginning at every worker that took one of the last jobs with it.
  function note_holder(job, worker)
    local conversation, beginning = marks_of(job)
    if conversation ~= '' then set_holders(conversation, '\n' .. worker .. '\n') end
    if beginning ~= '' and not noted[beginning] then note_beginning(beginning, worker) end
  end

  -- What another worker says of itself, and how many jobs it holds; false if it takes none.
  local function peer(name)
    if peers[name] == nil then
      local said = redis.pcall('HMGET', k_worker(name), WORKER.state, WORKER.resident, WORKER.batch_rows)
      local held = redis.pcall('SCARD', k_rq_worker_executions(name))
      local state, models, batch_rows
      if not said.err then state, models, batch_rows = unpack(said) end
      local serves = state == 'serving' and type(held) == 'number'
      peers[name] = serves and {models = ',' .. (models or '') .. ',', rows = tonumber(batch_rows or '') or 0, held = held}
    end
    return peers[name]
  end

  -- One of the mark's workers that serves the queue's model and suits; nil if none does.
  local function find_holder(mark, queue, suits)
    for name in string.gmatch(holders_of(mark), NAME) do
      local p = peer(name)
      if p and suits(p) and string.find(p.models, ',' .. string.match(queue, '^(.*):') .. ',', 1, true) then return p end
    end
  end

  local function has_row(p) return p.held < p.rows end

  local function any() return true end

  -- The worker that should have the job rather than this one, which holds `rows`; nil if this one should.
  -- A conversation stays at its worker while that one has room. A beginning is soon everywhere: it spreads as the load does.
  function better_place(job, queue, worker, rows)
    local conversation, beginning = marks_of(job)
    if conversation ~= '' and holders_of(conversation) ~= '' then
      if holds(conversation, worker) then return nil end
      local p = find_holder(conversation, queue, has_row)
      if p then return p end
    end
    if beginning == '' or holders_of(beginning) == '' or holds(beginning, worker) then return nil end
    return find_holder(beginning, queue, function(p) return has_row(p) and p.held <= rows + p.rows / SPREAD end)
  end

  -- Whether the job's beginning is another live worker's and not this one's, with room or without.
  function is_elsewhere(job, queue, worker)
    local _, beginning = marks_of(job)
    if beginning == '' or holders_of(beginning) == '' or holds(beginning, worker) then return false end
    return find_holder(beginning, queue, any) ~= nil
  end
end
